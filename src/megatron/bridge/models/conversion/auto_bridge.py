"""Where other bridges have AutoBridge; this one's is the roof, `megatron.bridge.auto_bridge`."""

from megatron.bridge.auto_bridge import AutoBridge

__all__ = ["AutoBridge"]
