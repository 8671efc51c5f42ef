"""Bridges for Qwen models of text alone: what the language models of the other families are."""

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout, ExpertLayout
from megatron.bridge.models.qwen_vl.families import (
    Qwen3Family,
    Qwen3MoEFamily,
    Qwen35Family,
    Qwen35MoEFamily,
)
from megatron.bridge.models.qwen_vl.names import HYBRID_TEXT_ROOTS, TEXT_ROOTS
from megatron.bridge.models.qwen_vl.parts import ALONE
from megatron.bridge.models.qwen_vl.qwen_bridge import QwenBridge
from megatron.bridge.models.qwen_vl.qwen_description import language_parts

MODEL = "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.standalone.QwenModel"
_PROVIDERS = "megatron.bridge.models.qwen_vl.qwen_text_providers"


class QwenTextBridge(QwenBridge):
    """A language model alone, whose Megatron names are those of a GPTModel."""

    prefixes = ALONE
    roots = TEXT_ROOTS
    layer_paths = (ALONE.layers,)
    parts = language_parts(ALONE)


@MegatronModelBridge.register_bridge(
    source=(
        "Qwen3ForCausalLM",
        "Qwen3Model",
        "Qwen3ForSequenceClassification",
        "Qwen3ForTokenClassification",
    ),
    target=MODEL,
    override=False,
)
class Qwen3Bridge(Qwen3Family, QwenTextBridge):
    """Qwen3ForCausalLM to and from QwenModel."""

    model_type = "qwen3"
    provider = f"{_PROVIDERS}.Qwen3ModelProvider"


@MegatronModelBridge.register_bridge(
    source=(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeModel",
        "Qwen3MoeForSequenceClassification",
        "Qwen3MoeForTokenClassification",
    ),
    target=MODEL,
    override=False,
)
class Qwen3MoEBridge(Qwen3MoEFamily, QwenTextBridge):
    """Qwen3MoeForCausalLM to and from QwenModel with routed experts."""

    model_type = "qwen3_moe"
    provider = f"{_PROVIDERS}.Qwen3MoEModelProvider"
    released_layout = DiskLayout(ExpertLayout.PER_EXPERT)
    merges_experts = True


@MegatronModelBridge.register_bridge(
    source=("Qwen3_5ForCausalLM", "Qwen3_5TextModel", "Qwen3_5TextForSequenceClassification"),
    target=MODEL,
    override=False,
)
class Qwen35Bridge(Qwen35Family, QwenTextBridge):
    """Qwen3_5ForCausalLM to and from QwenModel."""

    model_type = "qwen3_5_text"
    provider = f"{_PROVIDERS}.Qwen35ModelProvider"
    roots = HYBRID_TEXT_ROOTS


@MegatronModelBridge.register_bridge(
    source=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextModel"), target=MODEL, override=False
)
class Qwen35MoEBridge(Qwen35MoEFamily, QwenTextBridge):
    """Qwen3_5MoeForCausalLM to and from QwenModel."""

    model_type = "qwen3_5_moe_text"
    provider = f"{_PROVIDERS}.Qwen35MoEModelProvider"
    released_layout = DiskLayout(ExpertLayout.FUSED, ExpertLayout.FUSED)
    roots = HYBRID_TEXT_ROOTS
