"""Core attention on torch's scaled_dot_product_attention.

Unlike megatron-core's DotProductAttention it takes packed sequences, and padding masks together
with causal attention.
"""

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.backends.sequence_parts import SequenceParts

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


COMPUTED: Mapping[str, Any] = {
    "softmax_type": "vanilla",
    "qk_clip": False,
    "log_max_attention_logit": False,
}
"""Fields of a config that change what attention is, and the one value that is computed."""


class TorchCoreAttention(MegatronModule):
    """softmax(q k^T * scale) v, per head, for this rank's heads.

    Shapes: s query length, k key length, b batch, n query heads, g key/value heads (n % g == 0),
    d head size, t tokens of a packed batch. With context parallelism s, k and t are this rank's
    part, see `SequenceParts`; keys and values are gathered, whatever `cp_comm_type` is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        for field, only in {**COMPUTED, "window_size": None}.items():
            if (found := getattr(config, field)) != only:
                raise ConfigError(
                    f"{field}={found!r}: the torch attention backend implements only {only!r}. "
                    f"Set it, or use transformer_impl='transformer_engine'."
                )
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
            self.cp_group = groups.cp
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d], or packed [t, n, d].
            key: [k, b, g, d], or packed [t, g, d].
            value: as `key`.
            attention_mask: bool, True = masked out, broadcastable to [b, n, s, k], of the keys of
                all ranks; combined with the causal mask if there is one. A query with nothing to
                attend to gives zeros.
            attn_mask_type: overrides that of the constructor.
            attention_bias: not implemented, must be None.
            packed_seq_params: "thd" packing; sequences do not see each other.

        Returns:
            [s, b, n * d], or packed [t, n * d].
        """
        if attention_bias is not None:
            raise InputError("attention_bias is not implemented by the torch attention backend")
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        if packed_seq_params is not None:
            if attention_mask is not None:
                raise InputError(
                    "attention_mask and packed_seq_params were both given: a packed batch has no "
                    "padding. Pass one of them."
                )
            tokens = query.shape[0] * self._ranks
            lengths = packed_lengths(packed_seq_params, tokens, causal=causal)
            key, value = self._gathered(lengths, key, value)
            return self._packed(query, key, value, causal, lengths)

        key, value = self._gathered([key.shape[0] * self._ranks], key, value)
        # [s, b, heads, d] -> [b, heads, s, d]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = self._attend(query, key, value, causal, attention_mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    @property
    def _ranks(self) -> int:
        """How many ranks share a sequence."""
        return 1 if self.cp_group is None else self.cp_group.size()

    def _gathered(self, lengths: list[int], *parts: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of all ranks."""
        if self.cp_group is None:
            return parts
        sequences = SequenceParts(self.cp_group, lengths)
        return tuple(sequences.gather(part) for part in parts)

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, lengths: list[int]
    ) -> Tensor:
        """Every sequence by itself; those of equal length in one call."""
        if len(set(lengths)) == 1:
            batch = [
                x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (query, key, value)
            ]
            context = self._attend(batch[0], batch[1], batch[2], causal, None)
            return context.transpose(1, 2).flatten(2).flatten(0, 1)
        of_rank = [length // self._ranks for length in lengths]
        sequences = [query.split(of_rank), key.split(lengths), value.split(lengths)]
        same_length = defaultdict(list)
        for index, length in enumerate(lengths):
            same_length[length].append(index)

        contexts: list[Tensor] = [query.new_empty(0)] * len(lengths)
        for members in same_length.values():
            # [len(members), heads, length, d]
            batch = [torch.stack([part[i] for i in members]).transpose(1, 2) for part in sequences]
            context = self._attend(batch[0], batch[1], batch[2], causal, None)
            for index, one in zip(members, context.transpose(1, 2).flatten(2), strict=True):
                contexts[index] = one
        return torch.cat(contexts)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """query [b, n, s, d], key and value [b, g, k, d] -> [b, n, s, d]."""
        queries, keys = query.shape[-2], key.shape[-2]
        if causal and queries * self._ranks != keys:
            raise InputError(f"causal attention of {queries} queries to {keys} keys is ambiguous")
        visible = None
        if causal and (attention_mask is not None or self.cp_group is not None):
            visible = self._seen_from(keys, query.device)[:, None] >= torch.arange(
                keys, device=query.device
            )
        dropout = self.attention_dropout if self.training else 0.0
        # Heads differ from rank to rank, so the ranks must draw differently; with sequence
        # parallelism the whole block runs in the forked state already.
        fork = dropout > 0.0 and not self.config.sequence_parallel
        nothing_visible = None
        if attention_mask is not None:
            visible = ~attention_mask if visible is None else visible & ~attention_mask
            # softmax over nothing is NaN: let such a query see everything, then zero its output.
            nothing_visible = ~visible.any(-1, keepdim=True)
            visible = visible | nothing_visible
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=causal and visible is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context if nothing_visible is None else context.masked_fill(nothing_visible, 0.0)

    def _seen_from(self, length: int, device: torch.device) -> Tensor:
        """Places of this rank's queries in a sequence of that many keys."""
        if self.cp_group is None:
            return torch.arange(length, device=device)
        return SequenceParts(self.cp_group, [length]).own(device)


def packed_lengths(packed: PackedSeqParams, tokens: int, *, causal: bool) -> list[int]:
    """How long each packed sequence is, with the padding behind it.

    Args:
        packed: the packing.
        tokens: of the batch.
        causal: whether tokens see only those before them.

    Raises:
        InputError: the packing is not "thd", does not cover the tokens of the batch, or has padding
            that the attention would see.
    """
    if packed.qkv_format != "thd":
        raise InputError(f"packed_seq_params.qkv_format is {packed.qkv_format!r}, expected 'thd'")
    boundaries = packed.cu_seqlens_q
    if packed.cu_seqlens_q_padded is not None:
        # Padding behind each sequence: what comes later is invisible only to causal attention.
        if not causal:
            raise InputError("cu_seqlens_q_padded needs causal attention in the torch backend")
        boundaries = packed.cu_seqlens_q_padded
    lengths: list[int] = boundaries.diff().tolist()
    if sum(lengths) != tokens:
        raise InputError(f"packed_seq_params covers {sum(lengths)} tokens, the batch has {tokens}")
    return lengths
