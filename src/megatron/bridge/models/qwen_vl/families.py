"""The language models of the families, with a vision tower beside them or alone."""

from typing import Any

from megatron.bridge.dtypes import MIXABLE, TORCH_NAME_OF, widest
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.model_bridge import Tensors
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl import rows
from megatron.bridge.models.qwen_vl.config_keys import language_of
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout, ExpertLayout
from megatron.bridge.models.qwen_vl.parts import (
    DENSE_MLP,
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    SPARSE_MLP,
)
from megatron.bridge.models.qwen_vl.qwen_bridge import QwenBridge

_SSM_TENSORS = ("linear_attn.A_log", "linear_attn.norm.weight")


class Qwen3Family(QwenBridge):
    """Attention and one MLP in each layer."""

    def language_rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Embedding, attention, MLP and output layer."""
        layer = self.prefixes.layer
        return [
            *rows.embedding_rows(self.prefixes),
            *rows.attention_rows(layer),
            *rows.dense_mlp_rows(layer),
        ]


class Qwen3MoEFamily(QwenBridge):
    """Attention in each layer, and routed experts or one MLP."""

    def language_rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Embedding, attention, MLP or experts, and output layer."""
        layer, experts = self.prefixes.layer, disk.decoder or ExpertLayout.FUSED
        return [
            *rows.embedding_rows(self.prefixes),
            *rows.attention_rows(layer),
            *rows.dense_mlp_rows(layer.of_kind(DENSE_MLP)),
            *rows.moe_rows(layer.of_kind(SPARSE_MLP), experts),
        ]


class _HybridFamily(QwenBridge):
    """Gated DeltaNet and gated attention layers; dtypes differ from tensor to tensor."""

    def hybrid_rows(self) -> list[ParamMapping]:
        """What the dense and the MoE variant share: all but the MLPs."""
        layer = self.prefixes.layer
        return [
            *rows.embedding_rows(self.prefixes),
            *rows.attention_rows(layer.of_kind(FULL_ATTENTION), gated=True),
            *rows.gated_delta_rows(layer.of_kind(LINEAR_ATTENTION)),
            *rows.mtp_rows(self.prefixes),
            *rows.attention_rows(self.prefixes.mtp_layer, gated=True),
        ]

    def assumed_dtype(self, config: HFConfig, name: str, dtype: str) -> str:
        """F32 for two small tensors of each GDN layer where `mamba_ssm_dtype` is float32.

        That is how Qwen3.5 is released.
        """
        in_f32 = language_of(config).get("mamba_ssm_dtype", "") == "float32"
        return "F32" if in_f32 and name.endswith(_SSM_TENSORS) else dtype

    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider. Raises ConfigError."""
        tensors = self.expected_tensors(config, dtype) if tensors is None else tensors
        settings = super().provider_settings(config, dtype, tensors)
        return settings | {"ssm_dtype": _ssm_dtype(tensors)}


class Qwen35Family(_HybridFamily):
    """Each layer with one MLP, and an MTP layer of the same kind."""

    def language_rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Embedding, layers, MTP layer and output layer."""
        return [
            *self.hybrid_rows(),
            *rows.dense_mlp_rows(self.prefixes.layer),
            *rows.dense_mlp_rows(self.prefixes.mtp_layer),
        ]


class Qwen35MoEFamily(_HybridFamily):
    """Each layer with routed experts and a shared one, and an MTP layer of the same kind."""

    merges_experts = True

    def language_rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Embedding, layers, MTP layer and output layer."""
        layer, mtp = self.prefixes.layer, self.prefixes.mtp_layer
        decoder_experts = disk.decoder or ExpertLayout.FUSED
        mtp_experts = disk.mtp or ExpertLayout.PER_EXPERT
        return [
            *self.hybrid_rows(),
            *rows.dense_mlp_rows(layer.of_kind(DENSE_MLP)),
            *rows.moe_rows(layer.of_kind(SPARSE_MLP), decoder_experts, shared_expert=True),
            *rows.moe_rows(mtp, mtp_experts, shared_expert=True),
        ]


def _ssm_dtype(tensors: Tensors) -> str | None:
    """The dtype that holds all GDN parameters which the release keeps in F32; None without any.

    A model has one dtype for all of them; files may have several.

    Raises:
        ConfigError: one of them is in another dtype than F32, BF16 or F16.
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
