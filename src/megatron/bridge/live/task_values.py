"""What some conversion tasks make of a model, and their values in the place of its parameters."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron.bridge.errors import InputError
from megatron.bridge.live.conversion_tasks import ConversionTask
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, full_box, volume


def made_of(
    parameters: Sequence[torch.Tensor],
    plan: ConversionPlan,
    tensors: Sequence[LocalTensor],
    ranks: Ranks,
) -> list[str]:
    """The Hugging Face tensors that some parameters of all ranks make.

    Args:
        parameters: of this rank.
        plan: of the model.
        tensors: what this rank holds.
        ranks: all call this.

    Raises:
        InputError: they have only some of the parameters that make a tensor; on every rank alike.
    """
    is_of_a_parameter = _Memory(parameters)
    own: dict[str, set[Box]] = defaultdict(set)
    for local in tensors:
        if is_of_a_parameter(local.data):
            for shared, pair in plan.copies_to(local.key, local.box):
                own[pair.hf_name].add(hf_part(pair, shared))
    made: dict[str, set[Box]] = defaultdict(set)
    for found in ranks.all_of(lambda: dict(own)):
        for name, boxes in found.items():
            made[name] |= boxes
    for name, boxes in made.items():
        values, of_all = sum(map(volume, boxes)), volume(full_box(plan.hf[name].shape))
        if values != of_all:
            raise InputError(
                f"{name}: the parameters of the conversion tasks make {values} of its {of_all} "
                f"values; give all tasks of one mapping.group_key together, on every rank"
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
def holding_their_values(tasks: Sequence[ConversionTask]) -> Iterator[list[torch.nn.Parameter]]:
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
