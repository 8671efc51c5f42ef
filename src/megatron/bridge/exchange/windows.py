"""Cutting an exchange into windows: no rank sends or receives more than so many bytes at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

from megatron.bridge.dtypes import itemsize
from megatron.bridge.exchange.route import Move
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box, BoxIndex, row_blocks, volume

WINDOW_BYTES = 256 << 20
"""Unless something else is asked for."""

ALIGNMENT = 16
"""Every move begins at a multiple of so many bytes of its buffer: a place for any dtype."""

_STRIPES = 8, 64
"""A part of a tensor takes about so many stripes of it as there are ranks, so that many of them
send at once; but not fewer, nor more, for each stripe cuts moves."""


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
    names: Sequence[str],
    moves: tuple[Sequence[Move], Sequence[Move]],
    window_bytes: int,
    ranks: int,
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
        ranks: how many there are.
        largest: gives, of a list that every rank has, the greatest number at each place.
    """
    of_name: tuple[dict[str, list[Move]], ...] = ({}, {})
    for own, by_name in zip(moves, of_name, strict=True):
        for move in own:
            if move.sender != move.receiver:
                by_name.setdefault(move.name, []).append(move)
    loads: tuple[dict[str, list[int]], ...] = ({}, {})

    def measured(cutting: Cutting, changed: Iterable[str]) -> list[Load]:
        for by_name, load in zip(of_name, loads, strict=True):
            load.update((name, cutting.loads(name, by_name.get(name, ()))) for name in changed)
        units = list(cutting.units())
        most = largest([load[unit.name][unit.part] for load in loads for unit in units])
        return list(map(Load, most[: len(units)], most[len(units) :]))

    return fitted(Cutting(plan, dict.fromkeys(names, 1), ranks), measured, window_bytes)


def fitted(
    cutting: Cutting,
    measured: Callable[[Cutting, Iterable[str]], Sequence[Load]],
    window_bytes: int,
) -> Schedule:
    """Cut tensors into more parts until each fits into a window, and fill windows with them.

    Args:
        cutting: to begin with.
        measured: gives, of a cutting and the tensors that it cuts otherwise than the one before,
            the greatest loads of all units, in order.
        window_bytes: see `schedule`.
    """
    changed: Mapping[str, int] = cutting.parts
    while True:
        units = list(cutting.units())
        loads = measured(cutting, changed)
        changed = {
            unit.name: parts
            for unit, load in zip(units, loads, strict=True)
            if (parts := _parts(cutting, unit, load, window_bytes)) > cutting.parts[unit.name]
        }
        if not changed:
            return Schedule(cutting, tuple(_windows(units, loads, window_bytes)))
        cutting = cutting.finer(changed)


def slot_bytes(plan: ConversionPlan, move: Move) -> int:
    """The bytes of a buffer that a move takes."""
    return box_slot_bytes(move.box, plan.hf[move.name].dtype)


def box_slot_bytes(box: Box, dtype: str) -> int:
    """The bytes of a buffer that a box takes."""
    return -(-volume(box) * itemsize(dtype) // ALIGNMENT) * ALIGNMENT


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
