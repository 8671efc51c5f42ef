"""Context parallelism: which tokens of its sequences each rank computes.

A sequence is cut into 2n chunks of one length for n ranks, and rank r has the chunks r and
2n - 1 - r, in this order: with causal attention every rank then has as much to do as any other.
Packed sequences are cut one by one. That is the order of megatron-core and TransformerEngine, and
of the labels that their trainers cut.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.ssm.gated_delta_net.common import tensor_a2a_cp2hp, tensor_a2a_hp2cp
from torch import Tensor

from megatron.bridge.errors import InputError


class OneRank:
    """Stands for the process group of this rank alone, where only its size and rank are asked."""

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


class SequenceParts:
    """How sequences laid end to end are cut.

    Args:
        group: the context-parallel ranks.
        lengths: tokens of each sequence; of a batch [b, s], which is cut along s, s alone.

    Raises:
        InputError: a length is not a multiple of twice the number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup, lengths: Sequence[int]) -> None:
        self.group = group
        self._by_rank, self._in_order = _orders(tuple(lengths), group.size())

    def own(self, device: torch.device) -> Tensor:
        """int64 [tokens of this rank], their places in the whole."""
        return self._by_rank.chunk(self.group.size())[self.group.rank()].to(device)

    def cut(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of something that every rank has whole."""
        return whole.index_select(dim, self.own(whole.device))

    def gather(self, part: Tensor, dim: int = 0) -> Tensor:
        """The parts of all ranks, with the tokens of this rank for those of all at `dim`.

        Each rank uses the whole in its own way: the gradients are summed up.
        """
        parts = tensor_parallel.gather_from_sequence_parallel_region(
            part.movedim(dim, 0).contiguous(), group=self.group
        )
        return parts.index_select(0, self._in_order.to(part.device)).movedim(0, dim)

    def to_heads(self, part: Tensor) -> Tensor:
        """Some channels of all tokens for all channels of some: [s / n, b, f] -> [s, b, f / n]."""
        parts = tensor_a2a_cp2hp(part, 0, -1, self.group, undo_attention_load_balancing=False)
        return parts.index_select(0, self._in_order.to(part.device))

    def to_tokens(self, channels: Tensor) -> Tensor:
        """The way back: [s, b, f / n] -> [s / n, b, f]."""
        by_rank = channels.index_select(0, self._by_rank.to(channels.device))
        return tensor_a2a_hp2cp(by_rank, 0, -1, self.group, redo_attention_load_balancing=False)


@lru_cache(maxsize=16)
def _orders(lengths: tuple[int, ...], ranks: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of rank 0, then of rank 1, ... are in the whole; and the inverse."""
    if any(length % (2 * ranks) for length in lengths):
        raise InputError(
            f"sequence lengths {list(lengths)}: context_parallel_size = {ranks} cuts each into "
            f"{2 * ranks} equal chunks. Pad each to a multiple of {2 * ranks}."
        )
    chunks: list[list[Tensor]] = [[] for _ in range(ranks)]
    for sequence in torch.arange(sum(lengths), device="cpu").split(list(lengths)):
        cut = sequence.chunk(2 * ranks)
        for rank, of_rank in enumerate(chunks):
            of_rank += [cut[rank], cut[2 * ranks - 1 - rank]]
    by_rank = torch.cat([torch.cat(of_rank) for of_rank in chunks])
    return by_rank, by_rank.argsort()
