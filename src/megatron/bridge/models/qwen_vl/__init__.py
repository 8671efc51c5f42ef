"""Qwen models, of text alone and with vision: importing this package registers their bridges."""

from megatron.bridge.models.qwen_vl import (  # noqa: F401  (they register themselves)
    small_models,
    small_text_models,
)
from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLBridge, Qwen3VLMoEBridge
from megatron.bridge.models.qwen_vl.qwen35_vl_bridge import Qwen35VLBridge, Qwen35VLMoEBridge
from megatron.bridge.models.qwen_vl.qwen_text_bridges import (
    Qwen3Bridge,
    Qwen3MoEBridge,
    Qwen35Bridge,
    Qwen35MoEBridge,
)

__all__ = [
    "Qwen3Bridge",
    "Qwen3MoEBridge",
    "Qwen3VLBridge",
    "Qwen3VLMoEBridge",
    "Qwen35Bridge",
    "Qwen35MoEBridge",
    "Qwen35VLBridge",
    "Qwen35VLMoEBridge",
]
