"""Models between Hugging Face and Megatron-Core, both ways, exactly."""

from typing import TYPE_CHECKING, Any

import megatron.bridge.runtime  # noqa: F401  (before megatron-core is imported: silences it)

if TYPE_CHECKING:
    from megatron.bridge.auto_bridge import AutoBridge

__all__ = ["AutoBridge"]


def __getattr__(name: str) -> Any:
    """Import AutoBridge when it is asked for: the command line must answer at once."""
    if name == "AutoBridge":
        from megatron.bridge.auto_bridge import AutoBridge

        return AutoBridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
