"""Copies between memories; those of one shape at equal distances, at both ends, are one copy.

Ranks that want the same, or neighbouring parts of the same, are sent them at equal distances in a
buffer, and so they arrive from ranks that hold experts of one layer. Such copies are counted in
thousands, and what is kept of them, and asked of a device, is a view of them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from megatron.bridge.tensors.boxes import Box, Shape

_LOOPS = 2
"""Over the ranks of a replica of an engine, and over its replicas."""


class Elements(NamedTuple):
    """Elements of a memory, in the order of a box.

    Attributes:
        memory: that they are in.
        start: of the first one, in the storage.
        strides: of each axis of the box; what they are of an axis of extent 1 does not matter.
    """

    memory: torch.Tensor
    start: int
    strides: tuple[int, ...]

    def part(self, within: Box) -> Elements:
        """Those of a part of the box, in coordinates whose zero is its corner."""
        start = self.start
        for (begin, _), step in zip(within, self.strides, strict=True):
            start += begin * step
        return Elements(self.memory, start, self.strides)

    def view(self, shape: Shape) -> torch.Tensor:
        """As a tensor of the shape of the box."""
        return self.memory.as_strided(shape, self.strides, self.start)

    def bytes_as(self, other: Elements, shape: Shape) -> torch.Tensor | None:
        """All of them as uint8, if they follow one another as others do; None if they do not.

        Args:
            other: of a contiguous memory that holds nothing else, in any order.
            shape: of the box.
        """
        steps = zip(shape, self.strides, other.strides, strict=True)
        if self.memory.dtype != other.memory.dtype or any(
            size > 1 and own != of_other for size, own, of_other in steps
        ):
            return None
        return self.memory.as_strided((prod(shape),), (1,), self.start).view(torch.uint8)


@dataclass(frozen=True)
class Copies:
    """Copies that are made together.

    Attributes:
        computed: fill memory that others may copy.
        to: where is copied to bit by bit.
        of: what, in the same order.
    """

    computed: Sequence[Callable[[], None]]
    to: list[torch.Tensor]
    of: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.computed) + len(self.to)

    @torch.no_grad()
    def make(self) -> None:
        """Copy all of it.

        Raises:
            InexactCast: computed values do not fit the dtype that they are to have.
        """
        for compute in self.computed:
            compute()
        if self.to:
            torch._foreach_copy_(self.to, self.of)

    @torch.no_grad()
    def back(self) -> None:
        """Copy from where `make` copies to, as far as that is bit by bit."""
        if self.to:
            torch._foreach_copy_(self.of, self.to)


class CopyList:
    """Collects copies, in any order."""

    def __init__(self) -> None:
        self._computed: list[Callable[[], None]] = []
        self._starts: dict[_Alike, list[_Starts]] = defaultdict(list)
        self._memories: dict[int, torch.Tensor] = {}

    def compute(self, step: Callable[[], None]) -> None:
        """Fill memory before anything is copied."""
        self._computed.append(step)

    def add(self, to: Elements, of: Elements, shape: Shape, starts: Sequence[int] = (0,)) -> None:
        """Copy bit by bit.

        Args:
            to: a place.
            of: what is copied there.
            shape: of both.
            starts: of all places that it is copied to, as distances from `to`.
        """
        memories = id(to.memory), id(of.memory)
        self._memories[memories[0]], self._memories[memories[1]] = to.memory, of.memory
        alike = self._starts[*memories, shape, to.strides, of.strides]
        alike += [(to.start + start, of.start) for start in starts]

    def ready(self) -> Copies:
        """All of them, as few."""
        copies = Copies(self._computed, [], [])
        for (to, of, shape, *strides), starts in self._starts.items():
            for first, loops in _looped(starts):
                sizes = (*(loop.times for loop in loops), *shape)
                for end, views in enumerate((copies.to, copies.of)):
                    steps = (*(loop.steps[end] for loop in loops), *strides[end])
                    memory = self._memories[(to, of)[end]]
                    views.append(memory.as_strided(sizes, steps, first[end]))
        return copies


type _Alike = tuple[int, int, Shape, tuple[int, ...], tuple[int, ...]]
"""The memories copied to and of, a shape, its strides in either."""

type _Starts = tuple[int, int]
"""Where one copy begins in the memory that is copied to, and in that which is copied."""


class _Loop(NamedTuple):
    times: int
    steps: _Starts


def _looped(starts: list[_Starts]) -> Iterator[tuple[_Starts, tuple[_Loop, ...]]]:
    """The first starts of each loop, and the loops over the others, the outermost first."""
    found: dict[tuple[_Loop, ...], list[_Starts]] = {(): starts}
    for _ in range(_LOOPS):
        outer: dict[tuple[_Loop, ...], list[_Starts]] = defaultdict(list)
        for loops, own in found.items():
            for first, loop in _runs(sorted(own)):
                outer[(loop, *loops) if loop.times > 1 else loops].append(first)
        found = outer
    return ((first, loops) for loops, own in found.items() for first in own)


def _runs(starts: list[_Starts]) -> Iterator[tuple[_Starts, _Loop]]:
    """Ascending starts as runs at equal distances, none of them negative."""
    begin, count = 0, len(starts)
    while begin < count:
        first, end, steps = starts[begin], begin + 1, (0, 0)
        if end < count and starts[end][1] >= first[1]:
            steps = starts[end][0] - first[0], starts[end][1] - first[1]
            last = first
            while end < count and starts[end] == (last[0] + steps[0], last[1] + steps[1]):
                last, end = starts[end], end + 1
        yield first, _Loop(end - begin, steps)
        begin = end
