"""Cutting an exchange into windows: no rank sends or receives more than so many bytes at once."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.route import Move, Moves, MovesByName
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import (
    Box,
    Shape,
    absolute,
    box_shape,
    full_box,
    part_of,
    volume,
)
from megatron.bridge.text.quoting import quoted

WINDOW_BYTES = 256 << 20
"""Unless something else is asked for."""

ALIGNMENT = 16
"""Every move begins at a multiple of so many bytes of its buffer: a place for any dtype."""

_UNITS_OF_WINDOW = 4
"""So many fit at least, so that what is left empty is little and each rank finds one of its own."""


def check_window_bytes(given: object) -> None:
    """Raise InputError for what is no size of a window."""
    if type(given) is not int or given < 1:
        raise InputError(f"window_bytes is {quoted(given)}; expected a whole number from 1")


class Unit(NamedTuple):
    """What is never cut by the end of a window: a tensor, or one of several parts of it.

    A part of a tensor is a part of each box of it that moves, so that all ranks which send or
    receive any of it have as much to do in each part.

    Attributes:
        name: of the tensor.
        part: which of the parts.
    """

    name: str
    part: int


class Part(NamedTuple):
    """A part of a box.

    Attributes:
        within: in coordinates whose zero is the corner of the box.
        shape: of it.
        nbytes: of a buffer that it takes.
    """

    within: Box
    shape: Shape
    nbytes: int


class Piece(NamedTuple):
    """What a window has of a move."""

    move: Move
    part: Part

    @property
    def box(self) -> Box:
        """Of the tensor."""
        return absolute(self.part.within, self.move.box)


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

    def loads(self, name: str, moves: Iterable[Move]) -> list[int]:
        """The bytes that moves of a tensor take of a buffer, for each part of the tensor."""
        times: Counter[Shape] = Counter()
        for move in moves:
            times[move.shape] += len(move.peers)
        found = [0] * self.parts[name]
        for shape, count in times.items():
            for part, nbytes in enumerate(self.slots(name, shape)):
                found[part] += count * nbytes
        return found

    def parts_of(self, name: str, shape: Shape) -> Sequence[Part | None]:
        """A box of a tensor in its parts; None for one without elements."""
        return _parts_of(shape, self.plan.hf[name].dtype, self.parts[name])

    def slots(self, name: str, shape: Shape) -> list[int]:
        """The bytes of a buffer that a box of a tensor takes, part by part."""
        return [part.nbytes if part else 0 for part in self.parts_of(name, shape)]

    def units(self) -> Iterator[Unit]:
        """All of them, in order."""
        return (Unit(name, part) for name, count in self.parts.items() for part in range(count))

    def finer(self, names: Mapping[str, int]) -> Self:
        """With some tensors cut into more parts."""
        return replace(self, parts={**self.parts, **names})


@lru_cache(1 << 10)  # layers repeat
def _parts_of(shape: Shape, dtype: str, count: int) -> tuple[Part | None, ...]:
    boxes = (part_of(full_box(shape), number, count) for number in range(count))
    return tuple(
        None if box is None else Part(box, box_shape(box), slot_bytes(box, dtype)) for box in boxes
    )


@dataclass(frozen=True)
class Schedule:
    """All windows of an exchange, the same on every rank.

    Attributes:
        cutting: of the tensors.
        windows: the units of each, in order.
    """

    cutting: Cutting
    windows: tuple[tuple[Unit, ...], ...]

    def pieces(self, number: int, moves: MovesByName) -> list[Piece]:
        """What a window has of some moves, in an order that is the same at both ends."""
        return [
            Piece(move, part)
            for unit in self.windows[number]
            for move in moves.get(unit.name, ())
            if (part := self.cutting.parts_of(unit.name, move.shape)[unit.part]) is not None
        ]

    def nbytes(self, moves: MovesByName) -> list[int]:
        """The bytes of a buffer that moves take in each window."""
        loads = {name: self.cutting.loads(name, own) for name, own in moves.items()}
        return [
            sum(loads[unit.name][unit.part] for unit in window if unit.name in loads)
            for window in self.windows
        ]


def schedule(
    plan: ConversionPlan,
    places: Mapping[str, Hashable],
    moves: Moves,
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
        moves: of this rank.
        window_bytes: that a rank sends, and receives, in a window at most. A window of a single
            unit of as many parts as a tensor has rows may have more.
        largest: gives, of a list that every rank has, the greatest number at each place.
    """
    return fitted(
        Cutting(plan, dict.fromkeys(places, 1)),
        places,
        _OwnLoads((moves.sent, moves.received), largest),
        window_bytes,
    )


class Loads(Protocol):
    """What units put through the buffers of ranks."""

    def most(self, cutting: Cutting, changed: Iterable[str]) -> Sequence[int]:
        """Of each unit, in order, the most that any rank sends or receives.

        Args:
            cutting: into these units.
            changed: tensors that were cut otherwise, or not at all, when this was last called.
        """

    def ends(self, units: Sequence[Unit], window_bytes: int) -> Sequence[int]:
        """For each unit, where a window that begins with it has to end, so that it fits all ranks.

        Args:
            units: of the last cutting, in the order in which they are moved.
            window_bytes: that a rank sends, and receives.
        """


def fitted(
    cutting: Cutting, places: Mapping[str, Hashable], loads: Loads, window_bytes: int
) -> Schedule:
    """Cut tensors until several units fit into a window, and fill windows with them.

    Args:
        cutting: to begin with.
        places: see `schedule`.
        loads: of all ranks.
        window_bytes: see `schedule`.
    """
    changed: Mapping[str, int] = cutting.parts
    while True:
        most = loads.most(cutting, changed)
        changed = {
            unit.name: parts
            for unit, load in zip(cutting.units(), most, strict=True)
            if (parts := _parts(cutting, unit, load, window_bytes)) > cutting.parts[unit.name]
        }
        if not changed:
            units = _by_turns(cutting, places)
            return Schedule(cutting, tuple(_windows(units, loads.ends(units, window_bytes))))
        cutting = cutting.finer(changed)


class _OwnLoads:
    """Those of this rank, and what the others have more."""

    def __init__(
        self,
        moves: tuple[MovesByName, MovesByName],
        largest: Callable[[Sequence[int]], Sequence[int]],
    ) -> None:
        self._largest, self._moves = largest, moves
        self._loads: tuple[dict[str, list[int]], ...] = ({}, {})

    def most(self, cutting: Cutting, changed: Iterable[str]) -> Sequence[int]:
        names = list(changed)
        for by_name, loads in zip(self._moves, self._loads, strict=True):
            loads.update((name, cutting.loads(name, by_name.get(name, ()))) for name in names)
        return self._largest([max(self._of(unit)) for unit in cutting.units()])

    def ends(self, units: Sequence[Unit], window_bytes: int) -> Sequence[int]:
        ends, end = [], 0
        held, of_units = Load(0, 0), list(map(self._of, units))
        for start, load in enumerate(of_units):
            while end < len(units) and (end <= start or max(held + of_units[end]) <= window_bytes):
                held, end = held + of_units[end], end + 1
            ends.append(end)
            held = held - load
        # The end that is first on any rank is the least, and the greatest of the negatives.
        return [-end for end in self._largest([-end for end in ends])]

    def _of(self, unit: Unit) -> Load:
        return Load(*(loads[unit.name][unit.part] for loads in self._loads))


def slot_bytes(box: Box, dtype: str) -> int:
    """The bytes of a buffer that a box takes."""
    return -(-volume(box) * itemsize(dtype) // ALIGNMENT) * ALIGNMENT


def _by_turns(cutting: Cutting, places: Mapping[str, Hashable]) -> list[Unit]:
    """All units; those of one place in order, each place at all times as far as the others."""
    done: dict[Hashable, float] = defaultdict(float)
    at = {}
    for unit in cutting.units():
        at[unit] = done[places[unit.name]]
        done[places[unit.name]] += cutting.plan.hf[unit.name].nbytes / cutting.parts[unit.name]
    return sorted(at, key=lambda unit: at[unit] / max(1, done[places[unit.name]]))


def _parts(cutting: Cutting, unit: Unit, load: int, window_bytes: int) -> int:
    """Into how many parts the tensor of a unit should be cut."""
    now, most = cutting.parts[unit.name], max(1, window_bytes // _UNITS_OF_WINDOW)
    if load <= most:
        return now
    spec = cutting.plan.hf[unit.name]
    rows = max(1, volume(tuple((0, size) for size in spec.shape[:-1])))
    # Axes are even: halves and quarters of them are whole rows, and all of a size.
    return min(rows, now << (-(-load // most) - 1).bit_length())


def _windows(units: Sequence[Unit], ends: Sequence[int]) -> Iterator[tuple[Unit, ...]]:
    start = 0
    while start < len(units):
        yield tuple(units[start : ends[start]])
        start = ends[start]
