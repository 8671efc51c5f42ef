"""How many tokens each rank sends to the experts of each other: numbers, not a tensor.

`torch.distributed.all_to_all_single` takes its splits as a sequence of numbers. megatron-core
makes one where it moves a tensor from the GPU (moe_utils.py:1184 of 0.19.2, asked to by
token_dispatcher.py:927), and hands on a tensor that is on the CPU already (mappings.py:460).
"""

from contextlib import ExitStack
from typing import Any

import torch


def splits_are_numbers(undo: ExitStack) -> None:
    """Let the all-to-all dispatcher make numbers of the splits until `undo` is closed."""
    from megatron.core.transformer.moe import token_dispatcher as owner

    undo.callback(setattr, owner, "maybe_move_tensor_to_cpu", owner.maybe_move_tensor_to_cpu)
    owner.maybe_move_tensor_to_cpu = _on_cpu


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """In the place of the function of that name: the tensor is on the CPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
