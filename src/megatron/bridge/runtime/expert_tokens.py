"""How tokens get to experts, and back, on a CPU.

`torch.distributed.all_to_all_single` takes its splits as a sequence of numbers. megatron-core
makes one where it moves a tensor from the GPU (moe_utils.py:1184 of 0.19.2, asked to by
token_dispatcher.py:927), and hands on a tensor that is on the CPU already (mappings.py:460).

The tokens that come from the ranks are then sorted by expert, and sorted back in the end. Those of
one rank are in that order already: megatron-core copies them all the same (moe_utils.py:607, called
by token_dispatcher.py:775 and 810), which a kernel of a GPU does in no time, and a processor not.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def splits_are_numbers(undo: ExitStack) -> None:
    """Let the all-to-all dispatcher make numbers of the splits until `undo` is closed."""
    from megatron.core.transformer.moe import token_dispatcher as owner

    undo.callback(setattr, owner, "maybe_move_tensor_to_cpu", owner.maybe_move_tensor_to_cpu)
    owner.maybe_move_tensor_to_cpu = _on_cpu


def sorted_tokens_stay(undo: ExitStack) -> None:
    """Let tokens in the order of the experts stay where they are until `undo` is closed."""
    from megatron.core.transformer.moe import token_dispatcher as owner

    sort = owner.sort_chunks_by_idxs

    def sort_others(
        tokens: Tensor,
        split_sizes: Tensor,
        sorted_idxs: Tensor,
        probs: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        order = sorted_idxs.tolist()
        if order == [*range(len(order))]:
            return tokens, probs
        done: tuple[Tensor, Tensor | None] = sort(tokens, split_sizes, sorted_idxs, probs, **more)
        return done

    undo.callback(setattr, owner, "sort_chunks_by_idxs", sort)
    owner.sort_chunks_by_idxs = sort_others


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """In the place of the function of that name: the tensor is on the CPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
