"""TransformerEngine's layer backend, with batches that are padded.

Written against megatron-core 0.19's TESpecProvider; TransformerEngine needs a GPU. Run on one with
TransformerEngine 2.14; without a GPU the tests of this project run the torch backend.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class PaddedTEDotProductAttention(TEDotProductAttention):
    """TransformerEngine ignores the mask of a "causal" layer: ask for "padding_causal" with one."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As TEDotProductAttention; `attention_mask` [b, 1, 1, s] is True where masked out."""
        if attention_mask is not None and attn_mask_type == AttnMaskType.causal:
            attn_mask_type = AttnMaskType.padding_causal
        return super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


class PaddedTESpecProvider(TESpecProvider):
    """TransformerEngine's backend with an attention that takes padded batches."""

    def core_attention(self) -> type:
        """Scaled dot product attention."""
        return PaddedTEDotProductAttention
