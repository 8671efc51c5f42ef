"""Exporting a part of a live model, or other values in the place of some of its parameters."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from megatron.bridge.errors import InputError
from megatron.bridge.live.conversion_tasks import ConversionTask
from megatron.bridge.live.local_tensors import LiveTensors
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import read_hf
from megatron.bridge.tensors.boxes import full_box
from megatron.bridge.tensors.torch_views import as_torch


@torch.no_grad()
def export_tasks(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    tasks: Iterable[ConversionTask],
    casting: Casting = EXACTLY,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors that the parameters of some tasks make, in the order of the files.

    Args:
        model: the chunks of this rank.
        plan: of the model.
        tasks: of the model; each value is the task's `param_weight`.
        casting: of values that the plan's dtypes do not hold.

    Yields:
        Name and tensor.

    Raises:
        InputError: the tasks have only some of the parameters that make a tensor, a `param_weight`
            is not of its parameter's shape, or this rank does not hold all of the model.
        InexactCast: see `casting`.
    """
    held = [task for task in tasks if task.param_weight is not None]
    names = _made_by(plan, {task.mapping.megatron_param for task in held})
    with _in_place_of_parameters(held):
        source = LiveTensors(model, plan)  # which keeps views of what the parameters hold now
    for name in names:
        yield name, as_torch(read_hf(plan, name, full_box(plan.hf[name].shape), source, casting))


def _made_by(plan: ConversionPlan, parameters: set[str]) -> list[str]:
    """The Hugging Face tensors that these parameters make."""
    makers: dict[str, set[str]] = defaultdict(set)
    for parameter in plan.parameters:
        for _, pair in plan.copies_to(parameter.key, parameter.box):
            makers[pair.hf_name].add(parameter.name)
    for name in plan.hf:
        given = makers[name] & parameters
        if given and given != makers[name]:
            missing = min(makers[name] - parameters)
            raise InputError(
                f"{name} is made of {len(makers[name])} parameters, and the conversion tasks have "
                f"{len(given)} of them, without {missing}; give all tasks of one "
                f"mapping.group_key together"
            )
    return [name for name in plan.hf if makers[name] & parameters]


class _Value(NamedTuple):
    """What a parameter is to hold."""

    parameter: torch.nn.Parameter
    value: torch.Tensor


@contextmanager
def _in_place_of_parameters(tasks: Sequence[ConversionTask]) -> Iterator[None]:
    """Let parameters hold the values of their tasks inside of this context."""
    before: list[_Value] = []
    try:
        for parameter, value in list(_values(tasks)):
            before.append(_Value(parameter, parameter.data))
            parameter.data = value
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def _values(tasks: Sequence[ConversionTask]) -> Iterator[_Value]:
    """The parameters for which a task has another value."""
    for task in tasks:
        value, module = task.param_weight, task.megatron_module
        if value is None or module is None:
            continue
        own = dict(module.named_parameters(recurse=False))
        parameter = own[task.param_name.rpartition(".")[2]]
        if value is parameter:
            continue
        if value.shape != parameter.shape:
            raise InputError(
                f"{task.global_param_name}: param_weight has shape {tuple(value.shape)}, the "
                f"parameter {tuple(parameter.shape)}"
            )
        yield _Value(parameter, value.detach())
