"""Cutting an exchange into windows: no rank sends or receives more than so many bytes at once."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.route import Move
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box, BoxIndex, row_blocks, volume
from megatron.bridge.text.quoting import quoted

WINDOW_BYTES = 256 << 20
"""Unless something else is asked for."""

ALIGNMENT = 16
"""Every move begins at a multiple of so many bytes of its buffer: a place for any dtype."""

_STRIPES = 8, 64
"""A part of a tensor takes about so many stripes of it as there are ranks, so that many of them
send at once; but not fewer, nor more, for each stripe cuts moves."""


_UNITS_OF_WINDOW = 4
"""So many fit at least, so that what is left empty is little and each rank finds one of its own."""


def check_window_bytes(given: object) -> None:
    """Raise InputError for what is no size of a window."""
    if type(given) is not int or given < 1:
        raise InputError(f"window_bytes is {quoted(given)}; expected a whole number from 1")


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
        ranks: how many there are.
    """

    plan: ConversionPlan
    parts: Mapping[str, int]
    ranks: int

    def loads(self, name: str, moves: Iterable[Move]) -> list[int]:
        """The bytes that moves of a tensor take of a buffer, for each part of the tensor."""
        found = [0] * self.parts[name]
        dtype = self.plan.hf[name].dtype
        # Ranks that want the same are sent the same boxes.
        for box, times in Counter(move.box for move in moves).items():
            for unit, shared in self.cut(name, box):
                found[unit.part] += times * box_slot_bytes(shared, dtype)
        return found

    def cut(self, name: str, box: Box) -> Iterable[tuple[Unit, Box]]:
        """A box of a tensor, unit by unit."""
        if (stripes := self._stripes.get(name)) is None:
            return ((Unit(name, 0), box),)
        return ((unit, shared) for shared, unit in stripes.overlapping(box))

    def units(self) -> Iterator[Unit]:
        """All of them, in order."""
        return (Unit(name, part) for name, count in self.parts.items() for part in range(count))

    def finer(self, names: Mapping[str, int]) -> Self:
        """With some tensors cut into more parts, if there are so many rows."""
        return replace(self, parts={**self.parts, **names})

    @cached_property
    def _stripes(self) -> dict[str, BoxIndex[Unit]]:
        return {
            name: BoxIndex(
                (box, Unit(name, number % count)) for number, box in enumerate(self._rows(name))
            )
            for name, count in self.parts.items()
            if count > 1
        }

    def _rows(self, name: str) -> Iterator[tuple[tuple[int, int], ...]]:
        spec = self.plan.hf[name]
        fewest, most = _STRIPES
        stripes = self.parts[name] * min(max(fewest, self.ranks), most)
        return row_blocks(spec.shape, itemsize(spec.dtype), max(1, spec.nbytes // stripes))


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
        # Ranks that want the same are sent the same boxes.
        known: dict[tuple[str, Box], list[tuple[list[Move], Box]]] = {}
        for move in moves:
            if (place := (move.name, move.box)) not in known:
                cut = self.cutting.cut(*place)
                known[place] = [(found[number[unit]], box) for unit, box in cut]
            for own, box in known[place]:
                own.append(move if box == move.box else move._replace(box=box))
        return found


def schedule(
    plan: ConversionPlan,
    places: Mapping[str, Hashable],
    moves: tuple[Sequence[Move], Sequence[Move]],
    window_bytes: int,
    ranks: int,
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
        ranks: how many there are.
        largest: gives, of a list that every rank has, the greatest number at each place.
    """
    return fitted(
        Cutting(plan, dict.fromkeys(places, 1), ranks),
        places,
        _OwnLoads(moves, largest),
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
        moves: tuple[Sequence[Move], Sequence[Move]],
        largest: Callable[[Sequence[int]], Sequence[int]],
    ) -> None:
        self._largest = largest
        self._moves: tuple[dict[str, list[Move]], ...] = ({}, {})
        self._loads: tuple[dict[str, list[int]], ...] = ({}, {})
        for own, by_name in zip(moves, self._moves, strict=True):
            for move in own:
                if move.sender != move.receiver:
                    by_name.setdefault(move.name, []).append(move)

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


def slot_bytes(plan: ConversionPlan, move: Move) -> int:
    """The bytes of a buffer that a move takes."""
    return box_slot_bytes(move.box, plan.hf[move.name].dtype)


def _by_turns(cutting: Cutting, places: Mapping[str, Hashable]) -> list[Unit]:
    """All units; those of one place in order, each place at all times as far as the others."""
    done: dict[Hashable, float] = defaultdict(float)
    at = {}
    for unit in cutting.units():
        at[unit] = done[places[unit.name]]
        done[places[unit.name]] += cutting.plan.hf[unit.name].nbytes / cutting.parts[unit.name]
    return sorted(at, key=lambda unit: at[unit] / max(1, done[places[unit.name]]))


def box_slot_bytes(box: Box, dtype: str) -> int:
    """The bytes of a buffer that a box takes."""
    return -(-volume(box) * itemsize(dtype) // ALIGNMENT) * ALIGNMENT


def _parts(cutting: Cutting, unit: Unit, load: int, window_bytes: int) -> int:
    """Into how many parts the tensor of a unit should be cut."""
    now, most = cutting.parts[unit.name], max(1, window_bytes // _UNITS_OF_WINDOW)
    if load <= most:
        return now
    spec = cutting.plan.hf[unit.name]
    rows = max(1, volume(tuple((0, size) for size in spec.shape[:-1])))
    # A half more than it takes: stripes are not all of a length.
    return min(rows, now * -(-3 * load // (2 * most)))


def _windows(units: Sequence[Unit], ends: Sequence[int]) -> Iterator[tuple[Unit, ...]]:
    start = 0
    while start < len(units):
        yield tuple(units[start : ends[start]])
        start = ends[start]
