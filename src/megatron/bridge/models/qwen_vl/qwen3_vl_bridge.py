"""Bridges for Qwen3-VL, dense and mixture of experts."""

from megatron.bridge.models.conversion.model_bridge import (
    MegatronModelBridge,
    register_unsupported,
)
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout, ExpertLayout
from megatron.bridge.models.qwen_vl.expert_mapping import (
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
)
from megatron.bridge.models.qwen_vl.families import Qwen3Family, Qwen3MoEFamily
from megatron.bridge.models.qwen_vl.qwen_text_bridges import Qwen3Bridge, Qwen3MoEBridge
from megatron.bridge.models.qwen_vl.qwen_vl_bridge import MODEL, QwenVLBridge

__all__ = [
    "ExpertMLPDownProjMapping",
    "ExpertMLPGateUpProjMapping",
    "Qwen3VLBridge",
    "Qwen3VLMoEBridge",
]

_PROVIDERS = "megatron.bridge.models.qwen_vl.qwen3_vl_provider"

register_unsupported(
    ("Qwen3VLTextModel", "Qwen3VLMoeTextModel"),
    "it is the text half of a vision-language model, without a vision tower and without an output "
    "layer; put these weights in place of the language model of its base model, whose vision tower "
    "and config.json complete them, and convert that",
)


@MegatronModelBridge.register_bridge(
    source=("Qwen3VLForConditionalGeneration", "Qwen3VLModel"), target=MODEL, override=False
)
class Qwen3VLBridge(Qwen3Family, QwenVLBridge):
    """Qwen3VLForConditionalGeneration to and from Qwen3VLModel."""

    model_type = "qwen3_vl"
    alone = Qwen3Bridge
    provider = f"{_PROVIDERS}.Qwen3VLModelProvider"


@MegatronModelBridge.register_bridge(
    source=("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeModel"),
    target=MODEL,
    override=False,
)
class Qwen3VLMoEBridge(Qwen3MoEFamily, QwenVLBridge):
    """Qwen3VLMoeForConditionalGeneration to and from Qwen3VLModel with routed experts."""

    model_type = "qwen3_vl_moe"
    alone = Qwen3MoEBridge
    provider = f"{_PROVIDERS}.Qwen3VLMoEModelProvider"
    released_layout = DiskLayout(ExpertLayout.FUSED_TRANSPOSED)
