"""Bridges for Qwen3.5 vision-language models, dense and mixture of experts."""

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout, ExpertLayout
from megatron.bridge.models.qwen_vl.families import Qwen35Family, Qwen35MoEFamily
from megatron.bridge.models.qwen_vl.qwen_text_bridges import Qwen35Bridge, Qwen35MoEBridge
from megatron.bridge.models.qwen_vl.qwen_vl_bridge import MODEL, QwenVLBridge

_PROVIDERS = "megatron.bridge.models.qwen_vl.qwen35_vl_provider"


@MegatronModelBridge.register_bridge(
    source=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeModel"), target=MODEL, override=False
)
class Qwen35VLMoEBridge(Qwen35MoEFamily, QwenVLBridge):
    """Qwen3_5MoeForConditionalGeneration to and from Qwen3VLModel."""

    model_type = "qwen3_5_moe"
    alone = Qwen35MoEBridge
    provider = f"{_PROVIDERS}.Qwen35VLMoEModelProvider"
    released_layout = DiskLayout(ExpertLayout.FUSED, ExpertLayout.PER_EXPERT)


@MegatronModelBridge.register_bridge(
    source=(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Model",
        "Qwen3_5ForSequenceClassification",
        "Qwen3_5ForTokenClassification",
    ),
    target=MODEL,
    override=False,
)
class Qwen35VLBridge(Qwen35Family, QwenVLBridge):
    """Qwen3_5ForConditionalGeneration to and from Qwen3VLModel."""

    model_type = "qwen3_5"
    alone = Qwen35Bridge
    provider = f"{_PROVIDERS}.Qwen35VLModelProvider"
