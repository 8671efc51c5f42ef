"""Exporting a part of a live model, or other values in the place of some of its parameters."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from megatron.bridge.errors import InputError
from megatron.bridge.live.conversion_tasks import ConversionTask
from megatron.bridge.live.local_tensors import LiveTensors, LocalTensor, local_tensors
from megatron.bridge.live.weights import export_weights, whole_model
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import read_hf
from megatron.bridge.progress import Progress
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, full_box, volume
from megatron.bridge.tensors.torch_views import as_torch


def export_some(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    tasks: Iterable[ConversionTask] | None,
    casting: Casting,
    show: Callable[[], AbstractContextManager[Progress]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor of a model, or those that the parameters of some tasks make.

    Args:
        model: the chunks of this rank.
        plan: of the model.
        tasks: of the model, each with the value of its parameter; None for the whole model.
        casting: of values that the plan's dtypes do not hold.
        show: is entered while tensors are given.

    Yields:
        Name and tensor, in the order of the files.

    Raises:
        InputError: the tasks have only some of the parameters that make a tensor, a `param_weight`
            is not of its parameter's shape, or this rank does not hold all of the model.
        InexactCast: see `casting`.
    """
    if tasks is None:
        names = [name for name in plan.hf if name not in plan.carried]
        tensors = export_weights(model, plan, casting)
    else:
        names, source = _source_of_tasks(model, plan, list(tasks))
        tensors = _read(plan, names, source, casting)
    with show() as progress:
        progress.start("export", sum(plan.hf[name].nbytes for name in names))
        for name, tensor in tensors:
            progress.advance(plan.hf[name].nbytes)
            yield name, tensor


@torch.no_grad()
def _read(
    plan: ConversionPlan, names: Iterable[str], source: LiveTensors, casting: Casting
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        yield name, as_torch(read_hf(plan, name, full_box(plan.hf[name].shape), source, casting))


def _source_of_tasks(
    model: Sequence[torch.nn.Module], plan: ConversionPlan, tasks: Sequence[ConversionTask]
) -> tuple[list[str], LiveTensors]:
    """The tensors that the tasks make, and what they are read from."""
    with _holding_their_values(tasks) as parameters:
        # Both look at what the parameters hold now, and keep views of it.
        names = _made_of(parameters, plan, local_tensors(model))
        return names, whole_model(model, plan)


def _made_of(
    parameters: Sequence[torch.Tensor], plan: ConversionPlan, tensors: Sequence[LocalTensor]
) -> list[str]:
    """The Hugging Face tensors that these parameters make."""
    is_of_a_parameter = _Memory(parameters)
    made: dict[str, set[Box]] = defaultdict(set)
    for local in tensors:
        if is_of_a_parameter(local.data):
            for shared, pair in plan.copies_to(local.key, local.box):
                made[pair.hf_name].add(hf_part(pair, shared))
    for name, boxes in made.items():
        values, of_all = sum(map(volume, boxes)), volume(full_box(plan.hf[name].shape))
        if values != of_all:
            raise InputError(
                f"{name}: the parameters of the conversion tasks make {values} of its {of_all} "
                f"values; give all tasks of one mapping.group_key together, and of a model that is "
                f"split over ranks none"
            )
    return [name for name in plan.hf if name in made]


class _Memory:
    """Tells whether a tensor is a view of one of some others, or of a part of it."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._ranges = sorted(
            (*self._start(one), one.storage_offset() + one.numel()) for one in tensors
        )

    def __call__(self, view: torch.Tensor) -> bool:
        storage, start = self._start(view)
        index = bisect_right(self._ranges, (storage, start + 1)) - 1
        if index < 0:
            return False
        other, _, end = self._ranges[index]
        return other == storage and start < end

    @staticmethod
    def _start(tensor: torch.Tensor) -> tuple[int, int]:
        # Also on the meta device, where nothing has an address.
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


@contextmanager
def _holding_their_values(tasks: Sequence[ConversionTask]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters of the tasks, which hold the values of their tasks inside of this context."""
    own = [
        (parameter, value, parameter.data) for task in tasks for parameter, value in _value_of(task)
    ]
    try:
        for parameter, value, _ in own:
            parameter.data = value
        yield [parameter for parameter, *_ in own]
    finally:
        for parameter, _, before in own:
            parameter.data = before


def _value_of(task: ConversionTask) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """The parameter of a task and what it is to hold; nothing where another rank has it."""
    value, module = task.param_weight, task.megatron_module
    if value is None or module is None:
        return
    parameters = dict(module.named_parameters(recurse=False))
    parameter = parameters[task.param_name.rpartition(".")[2]]
    if value.shape != parameter.shape:
        raise InputError(
            f"{task.global_param_name}: param_weight has shape {tuple(value.shape)}, the "
            f"parameter {tuple(parameter.shape)}"
        )
    # What is the parameter's own keeps its place in memory.
    yield parameter, value.detach().contiguous()
