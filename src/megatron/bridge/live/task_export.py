"""Exporting a part of a live model, or other values in the place of some of its parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch

from megatron.bridge.errors import InputError
from megatron.bridge.live.conversion_tasks import ConversionTask
from megatron.bridge.live.weights import export_weights, whole_model
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import read_hf
from megatron.bridge.progress import Progress
from megatron.bridge.tensors.boxes import full_box
from megatron.bridge.tensors.torch_views import as_torch


def export_some(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    tasks: Iterable[ConversionTask] | None,
    casting: Casting,
    show: Callable[[], AbstractContextManager[Progress]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model, or those of some tasks, with their progress shown.

    Args:
        model: the chunks of this rank.
        plan: of the model.
        tasks: see `export_tasks`; None for the whole model.
        casting: of values that the plan's dtypes do not hold.
        show: is entered while tensors are given.

    Yields:
        Name and tensor.
    """
    given = None if tasks is None else list(tasks)
    names = plan.hf.keys() - plan.carried.keys() if given is None else {*_made_by(plan, given)}
    tensors = (
        export_weights(model, plan, casting)
        if given is None
        else export_tasks(model, plan, given, casting)
    )
    with show() as progress:
        progress.start("export", sum(plan.hf[name].nbytes for name in names))
        for name, tensor in tensors:
            progress.advance(plan.hf[name].nbytes)
            yield name, tensor


@torch.no_grad()
def export_tasks(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    tasks: Sequence[ConversionTask],
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
    names = _made_by(plan, tasks)
    with _in_place_of_parameters(tasks):
        source = whole_model(model, plan)  # which keeps views of what the parameters hold now
    for name in names:
        yield name, as_torch(read_hf(plan, name, full_box(plan.hf[name].shape), source, casting))


def _made_by(plan: ConversionPlan, tasks: Sequence[ConversionTask]) -> list[str]:
    """The Hugging Face tensors that the parameters of these tasks make."""
    parameters = {task.mapping.megatron_param for task in tasks if task.param_weight is not None}
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
