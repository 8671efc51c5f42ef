"""What an inference engine's own loader puts where, found by running it once without any data.

The loader gets tensors of the Hugging Face shapes on the meta device. Every view of them knows
where it is in its tensor, so each `copy_` into a parameter is a box of a tensor and a place in the
parameter's memory. Nothing is written. Afterwards the same boxes can be sent there directly, from
whatever layout the trainer has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.exchange.strided import Axis, boxes
from megatron.bridge.exchange.tracing import Trace, in_memory_order
from megatron.bridge.tensors.boxes import Box, box_shape, tiling_faults
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.quoting import quoted

type NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class RecordedPlace:
    """Elements of a parameter, by where they are in its memory.

    Attributes:
        parameter: its name.
        shape: of the elements.
        offset: of the first one in the parameter's storage.
        strides: of each axis.
    """

    parameter: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def of(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The elements, a view of the parameter's memory."""
        if (found := parameters.get(self.parameter)) is None:
            raise InputError(
                f"the parameters have no {quoted(self.parameter)}, which was recorded: record the "
                f"loader of this model"
            )
        return found.detach().as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class RecordedCopy:
    """A box of a Hugging Face tensor, and where the loader puts it.

    Attributes:
        name: of the tensor.
        box: of it.
        place: of the box's shape, with its axes in the order of the tensor's.
    """

    name: str
    box: Box
    place: RecordedPlace

    def landing(self, parameters: Mapping[str, torch.Tensor]) -> Landing:
        """The box and the memory that it fills, in these parameters."""
        return Landing(self.name, self.box, self.place.of(parameters))


@dataclass(frozen=True)
class Recording:
    """What a loader does: plain values, to be kept or sent to the trainer.

    Attributes:
        copies: every box, and where it goes.
        zeros: places that the loader fills with zeros, such as rows beyond the vocabulary.
        unused: tensors that were offered and of which nothing is loaded.
    """

    copies: tuple[RecordedCopy, ...]
    zeros: tuple[RecordedPlace, ...]
    unused: tuple[str, ...]

    def landings(self, parameters: Mapping[str, torch.Tensor]) -> list[Landing]:
        """All boxes with the memory that they fill, in these parameters."""
        return [one.landing(parameters) for one in self.copies]

    def fill_zeros(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill what the loader fills with zeros, once: no refit writes there."""
        for place in self.zeros:
            place.of(parameters).zero_()


def record(
    load_weights: Callable[[NamedTensors], Any],
    specs: Iterable[TensorSpec],
    parameters: Mapping[str, torch.Tensor],
    *,
    not_loaded: Iterable[str] = (),
) -> Recording:
    """Run a loader once on tensors without data, and record what it copies where.

    It may take views of any kind, copy, cast, concatenate and stack; what it computes otherwise
    cannot be said by boxes.

    Args:
        load_weights: the engine's own; takes (name, tensor) pairs.
        specs: the tensors that are offered, in order.
        parameters: those of the engine by name, on any device. They stay as they are.
        not_loaded: names of parameters that the loader leaves alone, in whole or in part.

    Raises:
        InputError: the loader does something else with a tensor or a parameter.
        PlanError: elements of a parameter are filled not at all or twice, and it is not one of
            `not_loaded`; every parameter is named.
    """
    sources = {
        spec.name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")
        for spec in specs
    }
    before = {name: _memory(one) for name, one in parameters.items()}
    trace = Trace(sources, parameters)
    with torch.no_grad(), trace:
        load_weights(iter(sources.items()))
    for name, one in parameters.items():
        if before[name] != _memory(one):
            raise InputError(
                f"{name}: the loader puts other memory in the place of the parameter's; it has to "
                f"copy into it"
            )
    copies, zeros = [], []
    for written in trace.written:
        place = RecordedPlace(
            written.parameter, box_shape(written.to.box), written.to.offset, written.to.strides
        )
        if written.source is None:
            zeros.append(place)
        else:
            copies.append(RecordedCopy(written.source, written.to.box, place))
    recording = Recording(
        tuple(copies), tuple(zeros), tuple(sorted(sources.keys() - {one.name for one in copies}))
    )
    if problems := list(_uncovered(recording, parameters, frozenset(not_loaded))):
        raise PlanError(problems, heading="the loader does not fill every parameter once")
    return recording


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()


def _uncovered(
    recording: Recording, parameters: Mapping[str, torch.Tensor], not_loaded: frozenset[str]
) -> Iterator[str]:
    """Parameters of which the places are not all elements, each once."""
    for name in sorted(not_loaded - parameters.keys()):
        yield f"not_loaded names {quoted(name)}, which is no parameter"
    found: dict[str, list[RecordedPlace]] = {name: [] for name in parameters}
    for place in (*(one.place for one in recording.copies), *recording.zeros):
        found[place.parameter].append(place)
    for name, places in found.items():
        shape = in_memory_order(parameters[name]).shape
        zero = int(parameters[name].storage_offset())
        held = [
            one.box
            for place in places
            for one in boxes(
                tuple(shape),
                place.offset - zero,
                [
                    Axis(size, step, 1)
                    for size, step in zip(place.shape, place.strides, strict=True)
                ],
                0,
            )
        ]
        faults = list(tiling_faults(tuple(shape), held)) if held else ["nothing fills it"]
        if name in not_loaded:
            faults = [one for one in faults if "times" in one]
        yield from (f"{name}: {fault}" for fault in faults)
