"""Whether the memory of targets can be filled: each element is there, and of one only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron.bridge.errors import InputError
from megatron.bridge.exchange.demand import source_of
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.exchange.roster import Held
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import format_box

_MOST_WORK = 1 << 20
"""Of proving that two views have no element in common; views of parameters take a few steps."""


def check_memory(
    plan: ConversionPlan, landings: Sequence[Landing], held: Iterable[Held] = ()
) -> None:
    """Refuse memory that does not keep what is put there, or that the model is read from.

    Two targets may be the same memory where their values are the same, as tied weights are.

    Args:
        plan: of the model.
        landings: of this rank.
        held: what this rank holds of the model.

    Raises:
        InputError: memory is on the meta device, has several elements in one place, or overlaps
            that of another target or of the model.
    """
    for landing in landings:
        if landing.out.is_meta:
            raise InputError(f"{_named(landing)}: its memory is on the meta device; give it some")
        if _overlaps_itself(landing.out):
            raise InputError(
                f"{_named(landing)}: several elements of its memory are in one place (shape "
                f"{tuple(landing.out.shape)}, strides {landing.out.stride()}); give each its own, "
                f"as by contiguous()"
            )
    places = [_Place.of(one.out, one) for one in landings if one.out.numel()]
    places += [_Place.of(one.data, one) for one in held if one.data.numel()]
    for one, other in _overlapping(places):
        if not _are_tied(plan, one, other):
            # A target stands first.
            owners = sorted((one.owner, other.owner), key=lambda own: not isinstance(own, Landing))
            target, whose = map(_named, owners)
            raise InputError(
                f"{target}: its memory overlaps that of {whose}; give each memory of its own"
            )


class _Place(NamedTuple):
    """The addresses from the first element to the last of some memory, and whose it is."""

    start: int
    end: int
    memory: torch.Tensor
    owner: Landing | Held

    @classmethod
    def of(cls, memory: torch.Tensor, owner: Landing | Held) -> _Place:
        last = sum(
            (size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True)
        )
        start = memory.data_ptr()
        return cls(start, start + (last + 1) * memory.itemsize, memory, owner)


def _overlapping(places: Sequence[_Place]) -> Iterator[tuple[_Place, _Place]]:
    """Pairs that have an element in common."""
    by_device: dict[torch.device, list[_Place]] = defaultdict(list)
    for place in places:
        by_device[place.memory.device].append(place)
    for of_device in by_device.values():
        near: list[_Place] = []
        for place in sorted(of_device, key=lambda one: one.start):
            near = [one for one in near if one.end > place.start]
            for one in near:
                are_landings = isinstance(one.owner, Landing), isinstance(place.owner, Landing)
                if any(are_landings) and _have_common(one.memory, place.memory):
                    yield one, place
            near.append(place)


def _have_common(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return np.shares_memory(_addresses(one), _addresses(other), max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return True  # not proven to be apart


class _Addresses:
    """Tells numpy where elements are, without the elements: they may be on any device."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(memory.shape),
            "strides": tuple(stride * memory.itemsize for stride in memory.stride()),
            "typestr": f"|V{memory.itemsize}",
            "data": (memory.data_ptr(), True),
        }


def _addresses(memory: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    return np.asarray(_Addresses(memory))


def _overlaps_itself(memory: torch.Tensor) -> bool:
    """Whether it is not so that each axis steps over all that the axes of smaller steps reach."""
    reach = 0
    axes = zip(memory.stride(), memory.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in axes if size > 1):
        if stride <= reach:
            return memory.numel() > 0
        reach += stride * (size - 1)
    return False


def _are_tied(plan: ConversionPlan, one: _Place, other: _Place) -> bool:
    """Whether both are the same elements and get the same values."""
    if not isinstance(one.owner, Landing) or not isinstance(other.owner, Landing):
        return False
    places, values = (
        [(place.start, place.memory.dtype, place.memory.stride()) for place in (one, other)],
        [(source_of(plan, of.name), of.box) for of in (one.owner, other.owner)],
    )
    return places[0] == places[1] and values[0] == values[1]


def _named(owner: Landing | Held) -> str:
    if isinstance(owner, Landing):
        return f"{owner.name}{format_box(owner.box)}"
    return f"the model's {owner.key}"
