"""Cutting an exchange into windows: no rank sends or receives more than so many bytes at once."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Self

from megatron.bridge.dtypes import itemsize
from megatron.bridge.exchange.route import Move
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import BoxIndex, row_blocks, volume

WINDOW_BYTES = 256 << 20
"""Unless something else is asked for."""

ALIGNMENT = 16
"""Every move begins at a multiple of so many bytes of its buffer: a place for any dtype."""

_STRIPES = 8
"""A part of a tensor takes about so many stripes of it, so that many ranks send at once."""


class Unit(NamedTuple):
    """What is never cut by the end of a window: a tensor, or one of several parts of it.

    Attributes:
        name: of the tensor.
        part: which of the parts, each made of stripes from all over the tensor.
    """

    name: str
    part: int


class Load(NamedTuple):
    """Bytes that go through the buffers of a rank."""

    sent: int
    received: int

    def __add__(self, other: object) -> "Load":
        if not isinstance(other, Load):
            return NotImplemented
        return Load(self.sent + other.sent, self.received + other.received)


@dataclass(frozen=True)
class Cutting:
    """Into how many parts tensors are cut.

    Attributes:
        plan: of the model.
        parts: of each tensor that is moved, in the order in which they are.
    """

    plan: ConversionPlan
    parts: Mapping[str, int]

    def cut(self, move: Move) -> Iterator[tuple[Unit, Move]]:
        """A move, unit by unit."""
        if (stripes := self._stripes.get(move.name)) is None:
            yield Unit(move.name, 0), move
            return
        for box, part in stripes.overlapping(move.box):
            yield Unit(move.name, part), move._replace(box=box)

    def units(self) -> Iterator[Unit]:
        """All of them, in order."""
        return (Unit(name, part) for name, count in self.parts.items() for part in range(count))

    def finer(self, names: Mapping[str, int]) -> Self:
        """With some tensors cut into more parts, if there are so many rows."""
        return replace(self, parts={**self.parts, **names})

    @cached_property
    def _stripes(self) -> dict[str, BoxIndex[int]]:
        return {
            name: BoxIndex((box, number % count) for number, box in enumerate(self._rows(name)))
            for name, count in self.parts.items()
            if count > 1
        }

    def _rows(self, name: str) -> Iterator[tuple[tuple[int, int], ...]]:
        spec = self.plan.hf[name]
        most = max(1, spec.nbytes // (self.parts[name] * _STRIPES))
        return row_blocks(spec.shape, itemsize(spec.dtype), most)


@dataclass(frozen=True)
class Window:
    """What goes through the buffers at once.

    Attributes:
        units: of it, in order.
        most: the bytes that a rank sends and receives, at most.
    """

    units: tuple[Unit, ...]
    most: Load


@dataclass(frozen=True)
class Schedule:
    """All windows of an exchange, the same on every rank.

    Attributes:
        cutting: of the tensors.
        windows: in order; each tensor is in one of them, or in several one after another.
    """

    cutting: Cutting
    windows: tuple[Window, ...]

    def by_window(self, moves: Sequence[Move]) -> list[list[Move]]:
        """Moves cut into those of each window, in the order in which they came."""
        number = {
            unit: number for number, window in enumerate(self.windows) for unit in window.units
        }
        found: list[list[Move]] = [[] for _ in self.windows]
        for unit, move in chain.from_iterable(map(self.cutting.cut, moves)):
            found[number[unit]].append(move)
        return found


def schedule(
    plan: ConversionPlan,
    names: Sequence[str],
    moves: tuple[Sequence[Move], Sequence[Move]],
    window_bytes: int,
    largest: Callable[[Sequence[int]], Sequence[int]],
) -> Schedule:
    """Cut what moves between ranks into windows.

    A unit takes as many bytes of a window as the rank with most of it has.

    Args:
        plan: of the model.
        names: of all tensors that move, in order.
        moves: those that this rank sends, and those that it receives.
        window_bytes: that a rank sends, and receives, in a window at most. A window of a single
            row of a tensor may have more.
        largest: gives, of a list that every rank has, the greatest number at each place.
    """
    cutting = Cutting(plan, dict.fromkeys(names, 1))
    while True:
        units = list(cutting.units())
        loads = _largest_loads(cutting, units, moves, largest)
        finer = {
            unit.name: parts
            for unit, load in zip(units, loads, strict=True)
            if (parts := _parts(cutting, unit, load, window_bytes)) > cutting.parts[unit.name]
        }
        if not finer:
            return Schedule(cutting, tuple(_windows(units, loads, window_bytes)))
        cutting = cutting.finer(finer)


def slot_bytes(plan: ConversionPlan, move: Move) -> int:
    """The bytes of a buffer that a move takes."""
    nbytes = volume(move.box) * itemsize(plan.hf[move.name].dtype)
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _largest_loads(
    cutting: Cutting,
    units: Sequence[Unit],
    moves: tuple[Sequence[Move], Sequence[Move]],
    largest: Callable[[Sequence[int]], Sequence[int]],
) -> list[Load]:
    own: list[int] = []
    for whole_moves in moves:
        loads: dict[Unit, int] = defaultdict(int)
        for whole in whole_moves:
            if whole.sender != whole.receiver:
                for unit, move in cutting.cut(whole):
                    loads[unit] += slot_bytes(cutting.plan, move)
        own += [loads[unit] for unit in units]
    most = largest(own)
    return list(map(Load, most[: len(units)], most[len(units) :]))


def _parts(cutting: Cutting, unit: Unit, load: Load, window_bytes: int) -> int:
    """Into how many parts the tensor of a unit should be cut."""
    now = cutting.parts[unit.name]
    if max(load) <= window_bytes:
        return now
    spec = cutting.plan.hf[unit.name]
    rows = max(1, volume(tuple((0, size) for size in spec.shape[:-1])))
    # Twice as many as it takes: stripes are not all of a length.
    return min(rows, now * -(-2 * max(load) // window_bytes))


def _windows(units: Sequence[Unit], loads: Sequence[Load], window_bytes: int) -> Iterator[Window]:
    own: list[Unit] = []
    most = Load(0, 0)
    for unit, load in zip(units, loads, strict=True):
        if own and max(most + load) > window_bytes:
            yield Window(tuple(own), most)
            own, most = [], Load(0, 0)
        own.append(unit)
        most = most + load
    if own:
        yield Window(tuple(own), most)
