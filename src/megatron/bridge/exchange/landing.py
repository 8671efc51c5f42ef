"""Where a box of a Hugging Face tensor goes: a place in somebody's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from megatron.bridge.dtypes import holds_all, safetensors_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box, box_shape, format_box, full_box
from megatron.bridge.text.quoting import quoted


@dataclass(frozen=True)
class Landing:
    """A box of a Hugging Face tensor and the memory that it fills.

    Attributes:
        name: of the tensor.
        box: of it.
        out: memory of the box's shape, in any strides: a view of a parameter, for example.
    """

    name: str
    box: Box
    out: torch.Tensor

    @classmethod
    def whole(cls, name: str, out: torch.Tensor) -> Self:
        """All of a tensor."""
        return cls(name, full_box(out.shape), out)

    @property
    def demand(self) -> Demand:
        """What it wants."""
        return Demand(self.name, self.box)


type Targets = Mapping[str, torch.Tensor] | Iterable[Landing]
"""Whole tensors by name, a `state_dict()` for example, or landings."""


def landings_of(targets: Targets, plan: ConversionPlan) -> list[Landing]:
    """The landings of what a caller gives.

    Args:
        targets: of this rank.
        plan: of the model; what it has no tensor for is refused with all that the model cannot
            give.

    Raises:
        InputError: something is no landing, or memory is not of the shape of its box.
    """
    if isinstance(targets, Mapping):
        for name, tensor in targets.items():
            _check_tensor(name, tensor)
            spec = plan.hf.get(name)
            if spec is not None and tuple(tensor.shape) != spec.shape:
                raise InputError(
                    f"{name}: its memory is of shape {tuple(tensor.shape)}; expected {spec.shape}, "
                    f"or a Landing, which says what part of the tensor it is"
                )
        return [Landing.whole(name, tensor) for name, tensor in targets.items()]
    found = list(targets)
    for landing in found:
        if not isinstance(landing, Landing):
            raise InputError(f"a target is {quoted(landing)}; expected a Landing")
        _check_tensor(landing.name, landing.out)
        if not _is_box(landing.box):
            raise InputError(
                f"{landing.name}: its box is {quoted(landing.box)}; expected a tuple with a pair "
                f"(start, stop) for each axis"
            )
        if tuple(landing.out.shape) != box_shape(landing.box):
            raise InputError(
                f"{landing.name}{format_box(landing.box)}: its memory is of shape "
                f"{tuple(landing.out.shape)}; expected {box_shape(landing.box)}"
            )
    return found


def _check_tensor(name: object, out: object) -> None:
    if not isinstance(out, torch.Tensor):
        raise InputError(f"{quoted(name)}: its memory is {quoted(out)}; expected a tensor")


def _is_box(box: object) -> bool:
    return isinstance(box, tuple) and all(
        isinstance(axis, tuple) and len(axis) == 2 and all(type(end) is int for end in axis)
        for axis in box
    )


def check_landings(plan: ConversionPlan, landings: Sequence[Landing], casting: Casting) -> None:
    """Refuse memory that does not hold the values.

    Args:
        plan: of the model.
        landings: of this rank.
        casting: of values that the dtype of the memory does not hold.

    Raises:
        InputError: memory has a dtype that does not hold all values of its tensor.
    """
    for landing in landings:
        if (spec := plan.hf.get(landing.name)) is None:
            continue  # refused with all that the model cannot give
        dtype = safetensors_dtype(landing.out.dtype)
        if not holds_all(dtype, spec.dtype) and not casting.of(landing.name).rounds:
            raise InputError(
                f"{landing.name}: its memory is {dtype}, which does not hold all values of "
                f"{spec.dtype}; give memory of that dtype, or round=True"
            )


def check_kept(plan: ConversionPlan, landings: Sequence[Landing]) -> None:
    """Refuse memory that does not keep what was sent: it cannot be changed where that changed.

    Raises:
        InputError: memory is narrower than its tensor.
    """
    for landing in landings:
        spec, dtype = plan.hf.get(landing.name), safetensors_dtype(landing.out.dtype)
        if spec is not None and not holds_all(dtype, spec.dtype):
            raise InputError(
                f"{landing.name}: its memory is {dtype}, narrower than the {spec.dtype} that is "
                f"sent, so changes cannot be put into it; give memory of {spec.dtype}, send "
                f"another dtype, or leave out delta"
            )
