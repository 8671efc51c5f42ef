"""Cutting an exchange into windows: no rank sends or receives more than so many bytes at once."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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


_UNITS_OF_WINDOW = 4
"""So many fit at least, so that what is left empty is little and each rank finds one of its own."""


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

    def __sub__(self, other: "Load") -> "Load":
        return Load(self.sent - other.sent, self.received - other.received)


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
class Schedule:
    """All windows of an exchange, the same on every rank.

    Attributes:
        cutting: of the tensors.
        windows: the units of each, in order.
    """

    cutting: Cutting
    windows: tuple[tuple[Unit, ...], ...]

    def by_window(self, moves: Sequence[Move]) -> list[list[Move]]:
        """Moves cut into those of each window, in the order in which they came."""
        number = {unit: number for number, window in enumerate(self.windows) for unit in window}
        found: list[list[Move]] = [[] for _ in self.windows]
        for unit, move in chain.from_iterable(map(self.cutting.cut, moves)):
            found[number[unit]].append(move)
        return found


def schedule(
    plan: ConversionPlan,
    places: Mapping[str, Hashable],
    moves: tuple[Sequence[Move], Sequence[Move]],
    window_bytes: int,
    largest: Callable[[Sequence[int]], Sequence[int]],
) -> Schedule:
    """Cut what moves between ranks into windows.

    A window ends where one more unit would be too much for some rank.

    Args:
        plan: of the model.
        places: of all tensors that move, in order, where each comes from. Those of all places take
            turns: layers follow one another by pipeline stages, and in their order the ranks of
            one stage would send, and then those of the next.
        moves: those that this rank sends, and those that it receives.
        window_bytes: that a rank sends, and receives, in a window at most. A window of a single
            row of a tensor may have more.
        largest: gives, of a list that every rank has, the greatest number at each place.
    """
    cutting = Cutting(plan, dict.fromkeys(places, 1))
    while True:
        units = _by_turns(cutting, places)
        own = _loads(cutting, units, moves)
        most = largest([max(load) for load in own])
        finer = {
            unit.name: parts
            for unit, load in zip(units, most, strict=True)
            if (parts := _parts(cutting, unit, load, window_bytes)) > cutting.parts[unit.name]
        }
        if not finer:
            # The end that is first on any rank is the least, and the greatest of the negatives.
            ends = largest([-end for end in _ends(own, window_bytes)])
            return Schedule(cutting, tuple(_windows(units, [-end for end in ends])))
        cutting = cutting.finer(finer)


def slot_bytes(plan: ConversionPlan, move: Move) -> int:
    """The bytes of a buffer that a move takes."""
    nbytes = volume(move.box) * itemsize(plan.hf[move.name].dtype)
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _by_turns(cutting: Cutting, places: Mapping[str, Hashable]) -> list[Unit]:
    """All units; those of one place in order, each place at all times as far as the others."""
    done: dict[Hashable, float] = defaultdict(float)
    at = {}
    for unit in cutting.units():
        at[unit] = done[places[unit.name]]
        done[places[unit.name]] += cutting.plan.hf[unit.name].nbytes / cutting.parts[unit.name]
    return sorted(at, key=lambda unit: at[unit] / max(1, done[places[unit.name]]))


def _loads(
    cutting: Cutting, units: Sequence[Unit], moves: tuple[Sequence[Move], Sequence[Move]]
) -> list[Load]:
    """What each unit puts through the buffers of this rank."""
    of_side = []
    for whole_moves in moves:
        loads: dict[Unit, int] = defaultdict(int)
        for whole in whole_moves:
            if whole.sender != whole.receiver:
                for unit, move in cutting.cut(whole):
                    loads[unit] += slot_bytes(cutting.plan, move)
        of_side.append(loads)
    return [Load(*(loads[unit] for loads in of_side)) for unit in units]


def _parts(cutting: Cutting, unit: Unit, load: int, window_bytes: int) -> int:
    """Into how many parts the tensor of a unit should be cut."""
    now, most = cutting.parts[unit.name], max(1, window_bytes // _UNITS_OF_WINDOW)
    if load <= most:
        return now
    spec = cutting.plan.hf[unit.name]
    rows = max(1, volume(tuple((0, size) for size in spec.shape[:-1])))
    # A half more than it takes: stripes are not all of a length.
    return min(rows, now * -(-3 * load // (2 * most)))


def _ends(loads: Sequence[Load], window_bytes: int) -> list[int]:
    """For each unit, where the window that begins with it has to end on this rank."""
    ends, end = [], 0
    held = Load(0, 0)
    for start, load in enumerate(loads):
        while end < len(loads) and (end <= start or max(held + loads[end]) <= window_bytes):
            held, end = held + loads[end], end + 1
        ends.append(end)
        held = held - load
    return ends


def _windows(units: Sequence[Unit], ends: Sequence[int]) -> Iterator[tuple[Unit, ...]]:
    start = 0
    while start < len(units):
        yield tuple(units[start : ends[start]])
        start = ends[start]
