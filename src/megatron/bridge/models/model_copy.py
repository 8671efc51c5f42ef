"""Deep copies of models: of everything but the process groups, which cannot be copied."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

_WHOLE = (
    ProcessGroup,
    TransformerConfig,
    torch.Tensor,
    type,
    FunctionType,
    BuiltinFunctionType,
    ModuleType,
)
"""What is not looked into."""


def deep_copy[Model: torch.nn.Module](model: Model, memo: dict[int, Any]) -> Model:
    """The model's `__deepcopy__`: parameters, buffers and config of its own, on the same groups.

    Gradients are not copied, as torch copies parameters without them. What megatron-core notes on
    a parameter (how it is split, for instance) is; the buffer that its DistributedDataParallel
    collects gradients in is not. Tensors left behind by a forward pass are copied without their
    history.
    """
    for held in _held(model):
        if isinstance(held, ProcessGroup):
            memo[id(held)] = held
        elif isinstance(held, torch.nn.Parameter):
            memo.setdefault(id(held), _copy_of(held))
        elif isinstance(held, torch.Tensor) and not held.is_leaf:
            memo[id(held)] = held.detach().clone()
    copied: Model = object.__new__(type(model))
    memo[id(model)] = copied
    copied.__dict__.update(copy.deepcopy(model.__dict__, memo))
    return copied


def _copy_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A copy with the notes on the parameter; torch's own has none."""
    copied = copy.deepcopy(parameter)
    notes = vars(parameter).items()
    vars(copied).update((name, copy.copy(note)) for name, note in notes if _is_plain(note))
    return copied


def _is_plain(note: object) -> bool:
    if isinstance(note, (list, tuple)):
        return all(map(_is_plain, note))
    return note is None or isinstance(note, (bool, int, float, str))


def _held(root: object) -> Iterator[object]:
    """Every object that a deep copy of `root` would reach, each once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        stack.extend(_parts(one))


def _parts(whole: object) -> Iterable[object]:
    if isinstance(whole, _WHOLE):
        return ()
    if isinstance(whole, Mapping):
        return list(whole.values())
    if isinstance(whole, (list, tuple, set, frozenset)):
        return list(whole)
    if isinstance(whole, MethodType):
        return (whole.__self__,)
    if isinstance(whole, partial):
        return (whole.func, *whole.args, *whole.keywords.values())
    return list(getattr(whole, "__dict__", {}).values())
