"""Parts of different lengths, gathered and reduced by gloo.

NCCL's process group takes tensors of different sizes in `all_gather` and `reduce_scatter`, gloo's
does not. megatron-core relies on it where both expert and expert-tensor parallelism are used:
the ranks that share experts were sent different numbers of tokens (tensor_parallel/mappings.py:154
and :201 of 0.19.2, called by token_dispatcher.py). Here each part is filled up to the longest.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def parts_may_differ(undo: ExitStack) -> None:
    """Let parts along the first axis have different lengths until `undo` is closed."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather_parts(
        input_: Tensor,
        group: Any,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        sizes = output_split_sizes
        if sizes is None or not _differ(sizes, group):
            return gather(input_, group, sizes, use_global_buffer)
        longest = max(sizes)
        parts = gather(_filled(input_, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_parts(
        input_: Tensor,
        group: Any,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        sizes = input_split_sizes
        if sizes is None or not _differ(sizes, group):
            return reduce_scatter(input_, group, sizes, use_global_buffer)
        filled = [_filled(part, max(sizes)) for part in input_.split(list(sizes))]
        return reduce_scatter(torch.cat(filled), group)[: sizes[group.rank()]]

    for name, replacement in (
        ("_gather_along_first_dim", gather_parts),
        ("_reduce_scatter_along_first_dim", reduce_scatter_parts),
    ):
        undo.callback(setattr, mappings, name, getattr(mappings, name))
        setattr(mappings, name, replacement)


def _differ(sizes: Sequence[int], group: Any) -> bool:
    return group.size() > 1 and len(set(sizes)) > 1


def _filled(part: Tensor, length: int) -> Tensor:
    return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])
