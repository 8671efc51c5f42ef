"""Packed sequences: where each one is, and which tokens are padding behind one."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.bridge.errors import InputError


@dataclass(frozen=True)
class Packing:
    """Where sequences lie, one after the other.

    Attributes:
        lengths: of each sequence, with the padding behind it.
        real: of each without that; the same where `cu_seqlens_q` alone tells nothing of padding.
    """

    lengths: list[int]
    real: list[int]

    @classmethod
    def of(cls, given: PackedSeqParams) -> Self:
        """Take what megatron-core describes a pack with.

        Raises:
            InputError: it is no "thd" pack, or its fields contradict each other.
        """
        if not isinstance(given, PackedSeqParams):
            raise InputError(
                f"packed_seq_params is of type {type(given).__name__}, expected megatron-core's "
                f"PackedSeqParams"
            )
        if given.qkv_format != "thd":
            raise InputError(
                f"packed_seq_params.qkv_format is {given.qkv_format!r}, expected 'thd'; without "
                f"packed sequences leave packed_seq_params out"
            )
        if given.local_cp_size is not None:
            raise InputError(
                f"packed_seq_params.local_cp_size is {given.local_cp_size}: all batches have the "
                f"provider's context_parallel_size, leave it out"
            )
        found = {name: _lengths(given, name) for name in _BOUNDARIES}
        for kind in ("", "_padded"):
            queries, keys = f"cu_seqlens_q{kind}", f"cu_seqlens_kv{kind}"
            if found[queries] != found[keys]:
                raise InputError(
                    f"packed_seq_params.{keys} differs from {queries}: tokens attend to the "
                    f"sequence that they are in, give the same for both"
                )
        real, padded = found["cu_seqlens_q"], found["cu_seqlens_q_padded"]
        lengths = padded or real
        if lengths is None:
            raise InputError(
                "packed_seq_params.cu_seqlens_q is None: expected where each sequence begins, and "
                "the end of the last one"
            )
        real = real or lengths
        if len(real) != len(lengths) or any(a > b for a, b in zip(real, lengths, strict=True)):
            raise InputError(
                f"packed_seq_params.cu_seqlens_q has sequences of {real} tokens, and "
                f"cu_seqlens_q_padded room for {lengths}"
            )
        return cls(lengths, real)

    @property
    def tokens(self) -> int:
        """In the pack, with padding."""
        return sum(self.lengths)

    def boundaries(self, device: torch.device) -> Tensor:
        """int64 [sequences + 1], where each sequence begins."""
        ends = torch.tensor([0, *self.lengths], device="cpu").cumsum(0)
        return ends.to(device)

    def real_tokens(self, device: torch.device) -> Tensor | None:
        """bool [1, t], True for real tokens; None if all are."""
        if self.real == self.lengths:
            return None
        parts = [
            torch.arange(length, device="cpu") < real
            for length, real in zip(self.lengths, self.real, strict=True)
        ]
        return torch.cat(parts)[None].to(device)


def with_padding_inside(packed: PackedSeqParams | None) -> PackedSeqParams | None:
    """The same pack with the padding as tokens of its sequences.

    Multi-token prediction shifts a pack between the boundaries of `cu_seqlens_q`, which are not
    where the sequences are if there is padding.
    """
    if packed is None or packed.cu_seqlens_q_padded is None:
        return packed
    return replace(
        packed,
        cu_seqlens_q=packed.cu_seqlens_q_padded,
        cu_seqlens_kv=packed.cu_seqlens_kv_padded,
    )


_BOUNDARIES = (
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "cu_seqlens_q_padded",
    "cu_seqlens_kv_padded",
)


def _lengths(packed: PackedSeqParams, name: str) -> list[int] | None:
    """Of the sequences between boundaries; None where there are none."""
    boundaries: Tensor | None = getattr(packed, name)
    if boundaries is None:
        return None
    shown: object = boundaries
    if isinstance(boundaries, Tensor):
        shown = f"{boundaries.dtype} of shape {list(boundaries.shape)}"
        if boundaries.ndim == 1 and not boundaries.is_floating_point():
            shown = found = boundaries.tolist()
            if len(found) > 1 and found[0] == 0 and sorted(found) == found:
                return [after - before for before, after in pairwise(found)]
    raise InputError(
        f"packed_seq_params.{name} is {shown}: expected integers [sequences + 1], from 0 to the "
        f"number of tokens, none smaller than the one before it"
    )
