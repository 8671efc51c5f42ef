"""Bridges for Qwen3.5 vision-language models, dense and mixture of experts."""

import logging
from typing import Any

from megatron.bridge.dtypes import MIXABLE, TORCH_NAME_OF, widest
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.model_bridge import (
    MegatronModelBridge,
    Tensors,
    register_unsupported,
)
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl import rows
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout, ExpertLayout
from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import MODEL, Qwen3VLMoEBridge
from megatron.bridge.models.qwen_vl.qwen_vl_bridge import TEXT_HALF, QwenVLBridge

logger = logging.getLogger(__name__)

_QWEN3_5_DENSE_HF_CLASS_NAME = "Qwen3_5ForConditionalGeneration"
_QWEN3_5_MOE_HF_CLASS_NAME = "Qwen3_5MoeForConditionalGeneration"

_TEXT_HALVES = (
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5TextModel",
    "Qwen3_5MoeTextModel",
    "Qwen3_5TextForSequenceClassification",
)
register_unsupported(_TEXT_HALVES, TEXT_HALF)

_SSM_TENSORS = ("linear_attn.A_log", "linear_attn.norm.weight")


def _hybrid_rows() -> list[ParamMapping]:
    """What the dense and the MoE variant share: all but the MLPs."""
    layer = rows.DECODER_LAYER
    return [
        *rows.embedding_rows(),
        *rows.attention_rows(layer.of_kind(rows.FULL_ATTENTION), gated=True),
        *rows.gated_delta_rows(layer.of_kind(rows.LINEAR_ATTENTION)),
        *rows.mtp_rows(),
        *rows.attention_rows(rows.MTP_MODEL_LAYER, gated=True),
        *rows.vision_rows(),
        *rows.deepstack_rows(),
    ]


def _ssm_dtype(tensors: Tensors) -> str | None:
    """The dtype that holds all GDN parameters which the release keeps in F32; None without any.

    A model has one for all of them; files may have several. Raises ConfigError.
    """
    dtypes = sorted({spec.dtype for name, spec in tensors.items() if name.endswith(_SSM_TENSORS)})
    if not dtypes:
        return None
    dtype = widest(*dtypes)
    if dtype not in MIXABLE:
        raise ConfigError(
            f"{' and '.join(_SSM_TENSORS)} should be in F32, BF16 or F16, found {dtypes}"
        )
    return TORCH_NAME_OF[dtype]


class _Qwen35Bridge(QwenVLBridge):
    """What both variants add to the other families: dtypes that differ from tensor to tensor."""

    def assumed_dtype(self, config: HFConfig, name: str, dtype: str) -> str:
        """As in the Qwen3.5 release: two small tensors of each GDN layer in `mamba_ssm_dtype`."""
        is_ssm = name.endswith(_SSM_TENSORS)
        return "F32" if is_ssm and config.text.get("mamba_ssm_dtype", "") == "float32" else dtype

    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider. Raises ConfigError."""
        tensors = self.expected_tensors(config, dtype) if tensors is None else tensors
        return super().provider_settings(config, dtype) | {"ssm_dtype": _ssm_dtype(tensors)}


@MegatronModelBridge.register_bridge(
    source=(_QWEN3_5_MOE_HF_CLASS_NAME, "Qwen3_5MoeModel"), target=MODEL, override=False
)
class Qwen35VLMoEBridge(_Qwen35Bridge, Qwen3VLMoEBridge):
    """Qwen3_5MoeForConditionalGeneration to and from Qwen3VLModel.

    Gated DeltaNet and gated attention layers, each with routed experts and a shared one, and an
    MTP layer of the same kind.
    """

    model_type = "qwen3_5_moe"
    provider = "megatron.bridge.models.qwen_vl.qwen35_vl_provider.Qwen35VLMoEModelProvider"
    released_layout = DiskLayout(ExpertLayout.FUSED, ExpertLayout.PER_EXPERT)
    merges_experts = True

    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Language model, MTP layer and vision tower."""
        layer, mtp = rows.DECODER_LAYER, rows.MTP_MODEL_LAYER
        decoder_experts = disk.decoder or ExpertLayout.FUSED
        mtp_experts = disk.mtp or ExpertLayout.PER_EXPERT
        return [
            *_hybrid_rows(),
            *rows.dense_mlp_rows(layer.of_kind(rows.DENSE_MLP)),
            *rows.moe_rows(layer.of_kind(rows.SPARSE_MLP), decoder_experts, shared_expert=True),
            *rows.moe_rows(mtp, mtp_experts, shared_expert=True),
        ]


@MegatronModelBridge.register_bridge(
    source=(
        _QWEN3_5_DENSE_HF_CLASS_NAME,
        "Qwen3_5Model",
        "Qwen3_5ForSequenceClassification",
        "Qwen3_5ForTokenClassification",
    ),
    target=MODEL,
    override=False,
)
class Qwen35VLBridge(_Qwen35Bridge):
    """Qwen3_5ForConditionalGeneration to and from Qwen3VLModel.

    Gated DeltaNet and gated attention layers, each with one MLP, and an MTP layer.
    """

    model_type = "qwen3_5"
    provider = "megatron.bridge.models.qwen_vl.qwen35_vl_provider.Qwen35VLModelProvider"

    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Language model, MTP layer and vision tower."""
        return [
            *_hybrid_rows(),
            *rows.dense_mlp_rows(rows.DECODER_LAYER),
            *rows.dense_mlp_rows(rows.MTP_MODEL_LAYER),
        ]
