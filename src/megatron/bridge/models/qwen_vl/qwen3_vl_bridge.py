"""Bridges for Qwen3-VL, dense and mixture of experts."""

from megatron.bridge.models.conversion.model_bridge import (
    MegatronModelBridge,
    register_unsupported,
)
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.qwen_vl import rows
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout, ExpertLayout
from megatron.bridge.models.qwen_vl.expert_mapping import (
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
)
from megatron.bridge.models.qwen_vl.qwen_vl_bridge import TEXT_HALF, QwenVLBridge

__all__ = [
    "ExpertMLPDownProjMapping",
    "ExpertMLPGateUpProjMapping",
    "Qwen3VLBridge",
    "Qwen3VLMoEBridge",
]

MODEL = "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model.Qwen3VLModel"

register_unsupported(("Qwen3VLTextModel", "Qwen3VLMoeTextModel"), TEXT_HALF)


@MegatronModelBridge.register_bridge(
    source=("Qwen3VLForConditionalGeneration", "Qwen3VLModel"), target=MODEL, override=False
)
class Qwen3VLBridge(QwenVLBridge):
    """Qwen3VLForConditionalGeneration to and from Qwen3VLModel."""

    model_type = "qwen3_vl"
    provider = "megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider"

    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Language model, vision tower and deepstack mergers."""
        return [
            *rows.embedding_rows(),
            *rows.attention_rows(rows.DECODER_LAYER),
            *rows.dense_mlp_rows(rows.DECODER_LAYER),
            *rows.vision_rows(),
            *rows.deepstack_rows(),
        ]


@MegatronModelBridge.register_bridge(
    source=("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeModel"),
    target=MODEL,
    override=False,
)
class Qwen3VLMoEBridge(QwenVLBridge):
    """Qwen3VLMoeForConditionalGeneration to and from Qwen3VLModel with routed experts."""

    model_type = "qwen3_vl_moe"
    provider = "megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLMoEModelProvider"
    released_layout = DiskLayout(ExpertLayout.FUSED_TRANSPOSED)

    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """As Qwen3VLBridge, with routed experts in the layers that have them."""
        layer = rows.DECODER_LAYER
        experts = disk.decoder or ExpertLayout.FUSED
        return [
            *rows.embedding_rows(),
            *rows.attention_rows(layer),
            *rows.dense_mlp_rows(layer.of_kind(rows.DENSE_MLP)),
            *rows.moe_rows(layer.of_kind(rows.SPARSE_MLP), experts),
            *rows.vision_rows(),
            *rows.deepstack_rows(),
        ]
