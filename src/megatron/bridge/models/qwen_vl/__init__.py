"""Qwen vision-language models: importing this package registers their bridges."""

from megatron.bridge.models.qwen_vl import small_models  # noqa: F401  (they register themselves)
from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLBridge, Qwen3VLMoEBridge
from megatron.bridge.models.qwen_vl.qwen35_vl_bridge import Qwen35VLBridge, Qwen35VLMoEBridge

__all__ = ["Qwen3VLBridge", "Qwen3VLMoEBridge", "Qwen35VLBridge", "Qwen35VLMoEBridge"]
