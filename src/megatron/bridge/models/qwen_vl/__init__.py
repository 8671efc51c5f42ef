"""Qwen vision-language models: importing this package registers their bridges."""

from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLBridge

__all__ = ["Qwen3VLBridge"]
