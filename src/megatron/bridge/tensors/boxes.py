"""Boxes: half-open index ranges, one per axis, and the proof that a set of them tiles a tensor.

A box of a tensor of shape ``(s0, s1, ...)`` is ``((a0, b0), (a1, b1), ...)`` with
``0 <= a < b <= s`` on every axis. The box of a scalar is ``()``. Nothing here knows of tensors,
files or processes.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, product
from math import prod
from types import EllipsisType
from typing import cast

Shape = tuple[int, ...]
Interval = tuple[int, int]
Box = tuple[Interval, ...]


def full_box(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> Shape:
    """The extent of a box along every axis."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """How many elements a box holds."""
    return prod(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share, or None."""
    shared = []
    for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True):
        # Asked for millions of times in a large model; `max` and `min` take twice as long.
        start = a_start if a_start > b_start else b_start  # noqa: FURB136
        stop = a_stop if a_stop < b_stop else b_stop  # noqa: FURB136
        if start >= stop:
            return None
        shared.append((start, stop))
    return tuple(shared)


def relative(box: Box, origin: Box) -> Box:
    """`box` in coordinates whose zero is the lower corner of `origin`."""
    return tuple(
        (start - zero, stop - zero) for (start, stop), (zero, _) in zip(box, origin, strict=True)
    )


def absolute(box: Box, origin: Box) -> Box:
    """The `box` that is in coordinates whose zero is the lower corner of `origin`, in origin's."""
    return tuple(
        (zero + start, zero + stop) for (start, stop), (zero, _) in zip(box, origin, strict=True)
    )


def slices(box: Box) -> tuple[slice | EllipsisType, ...]:
    """The index that picks a box out of an array, a tensor or a safetensors slice.

    It ends in "...", for of a scalar numpy would make a copy without.
    """
    return (*(slice(start, stop) for start, stop in box), ...)


def row_blocks(
    shape: Sequence[int], itemsize: int, max_bytes: int, rows_multiple: int = 1
) -> Iterator[Box]:
    """Boxes that tile a tensor in row-major order, each contiguous and at most `max_bytes` long.

    A single element that is longer is a block of its own.

    Args:
        shape: of the tensor.
        itemsize: bytes of an element.
        max_bytes: of a block.
        rows_multiple: blocks that cut the second to last axis cut it at multiples of this, and none
            cuts the last axis; then a block of so many rows may be longer than `max_bytes`.
    """
    if 0 in shape:
        return
    # Every axis before `axis` is walked through in steps of one, `axis` in steps of `step`.
    axis, step, slab = 0, 1, prod(shape) * itemsize
    last = len(shape) - 1 if rows_multiple == 1 else len(shape) - 2
    if not shape or slab <= max_bytes:
        yield full_box(shape)
        return
    while axis < last and slab // shape[axis] > max_bytes:
        slab //= shape[axis]
        axis += 1
    step = max(1, max_bytes // (slab // shape[axis]))
    step = -(-shape[axis] // -(-shape[axis] // step))  # no sliver at the end
    if rows_multiple > 1 and axis == last:
        step = max(rows_multiple, step - step % rows_multiple)
    rest = full_box(shape[axis + 1 :])
    for leading in product(*(range(size) for size in shape[:axis])):
        fixed = tuple((index, index + 1) for index in leading)
        for start in range(0, shape[axis], step):
            yield (*fixed, (start, min(start + step, shape[axis])), *rest)


def blocks_of(box: Box, itemsize: int, max_bytes: int) -> Iterator[Box]:
    """Boxes that tile a box in row-major order, each at most `max_bytes` long; see `row_blocks`."""
    return (absolute(block, box) for block in row_blocks(box_shape(box), itemsize, max_bytes))


def part_of(box: Box, number: int, count: int) -> Box | None:
    """One of so many parts of a box, which tile it in row-major order.

    They are rows of its first axis; where there are fewer rows than parts, rows within each of
    them. None for a part that is empty, where there are fewer elements than parts.
    """
    found = list(box)
    for axis, (start, stop) in enumerate(box):
        rows = stop - start
        if rows >= count:
            found[axis] = start + number * rows // count, start + (number + 1) * rows // count
            return tuple(found)
        row = number * rows // count
        found[axis] = start + row, start + row + 1
        first = -(-row * count // rows)  # of the parts of this row
        number, count = number - first, -(-(row + 1) * count // rows) - first
    return tuple(found) if number == 0 else None


def joined(boxes: Iterable[Box]) -> list[Box]:
    """Boxes that hold the same elements; neighbours are one, along one axis after the other."""
    found = sorted(dict.fromkeys(boxes))
    for axis in reversed(range(len(found[0]) if len(found) > 1 else 0)):
        rows: dict[tuple[Box, Box], list[Interval]] = defaultdict(list)
        for box in found:
            intervals = rows[box[:axis], box[axis + 1 :]]
            if intervals and intervals[-1][1] == box[axis][0]:
                intervals[-1] = intervals[-1][0], box[axis][1]
            else:
                intervals.append(box[axis])
        found = sorted(
            (*before, interval, *after)
            for (before, after), intervals in rows.items()
            for interval in intervals
        )
    return found


def format_box(box: Box) -> str:
    """``[0:4, 8:16]``, as it is written in Python."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def tiling_faults(shape: Shape, boxes: Iterable[Box]) -> Iterator[str]:
    """Why `boxes` do not tile a tensor of `shape` exactly: gaps, overlaps, boxes that stick out.

    Nothing is yielded for an exact tiling. Of gaps and overlaps the first is named. The work is
    linear in the number of boxes, however they lie, but for a factor of 2 per axis.
    """
    inside = []
    limits = full_box(shape)
    for box in boxes:
        if len(box) != len(shape):
            yield f"box {format_box(box)} does not have the {len(shape)} axes of the tensor"
        elif intersect(box, limits) != box:
            yield f"box {format_box(box)} is empty or sticks out of shape {shape}"
        else:
            inside.append(box)
    if inside == [limits]:
        return
    # The boxes tile the tensor if the sum of what they cover, less the tensor itself, is 0.
    covered = Counter(inside)
    covered[limits] -= 1
    if (found := _first_excess(covered)) is not None:
        corner, excess = found
        cell = []
        for axis, start in enumerate(corner):
            bounds = {shape[axis], *(bound for box in inside for bound in box[axis])}
            cell.append((start, min(bound for bound in bounds if bound > start)))
        fault = f"is filled {excess + 1} times" if excess > 0 else "is not filled"
        yield f"{format_box(tuple(cell))} {fault}"


def _first_excess(covered: Mapping[Box, int]) -> tuple[tuple[int, ...], int] | None:
    """The first point, in row-major order, where the weights of the boxes do not add up to 0.

    They add up to 0 everywhere if they do so, one axis less, in what begins and ends at each bound
    of the first axis. Neighbours of a grid end where others begin: there nothing is left to do.
    """
    covered = {box: weight for box, weight in covered.items() if weight}
    if not covered:
        return None
    if () in covered:
        return (), covered[()]
    changes: defaultdict[int, Counter[Box]] = defaultdict(Counter)
    for ((start, stop), *rest), weight in covered.items():
        changes[start][tuple(rest)] += weight
        changes[stop][tuple(rest)] -= weight
    for bound in sorted(changes):
        if (found := _first_excess(changes[bound])) is not None:
            corner, excess = found
            return (bound, *corner), excess
    return None


class BoxIndex[Item]:
    """Finds, among many boxed items of one tensor, those that overlap a box.

    Items are kept in a tree with one level per axis, so a look-up in a grid touches little more
    than what it returns.
    """

    def __init__(self, items: Iterable[tuple[Box, Item]]) -> None:
        self._root = _level(list(items), 0)

    def overlapping(self, box: Box) -> Iterator[tuple[Box, Item]]:
        """(shared part, item) for every item whose box overlaps `box`."""
        for leaf in self._leaves(box):
            for item_box, item in leaf:
                if (shared := intersect(item_box, box)) is not None:
                    yield shared, item

    def _leaves(self, box: Box) -> "Iterable[_Leaf[Item]]":
        """Those that hold all items whose boxes overlap `box`."""
        leaves: list[_Leaf[Item]] = []
        levels = [self._root]
        for start, stop in box:
            below: list[_Level[Item]] = []
            for level in levels:
                if isinstance(level, list):
                    leaves.append(level)
                else:
                    below += level.near(start, stop)
            levels = below
        return chain(leaves, cast("list[_Leaf[Item]]", levels))


type _Leaf[Item] = list[tuple[Box, Item]]
type _Level[Item] = _Leaf[Item] | _Branch[Item]


class _Branch[Item]:
    """Items by their intervals along one axis, in the order of their starts.

    `reach` is the greatest stop up to each interval: its own where intervals do not overlap.
    """

    __slots__ = ("below", "reach", "starts")

    def __init__(self, items: _Leaf[Item], axis: int) -> None:
        groups: defaultdict[Interval, _Leaf[Item]] = defaultdict(list)
        for item in items:
            groups[item[0][axis]].append(item)
        intervals = sorted(groups)
        self.starts = [start for start, _ in intervals]
        self.reach = list(accumulate((stop for _, stop in intervals), max))
        self.below = [_level(groups[interval], axis + 1) for interval in intervals]

    def near(self, start: int, stop: int) -> list[_Level[Item]]:
        """All groups whose intervals overlap this one; others only if intervals overlap."""
        first, last = bisect_right(self.reach, start), bisect_left(self.starts, stop)
        return self.below[first:last]


def _level[Item](items: _Leaf[Item], axis: int) -> _Level[Item]:
    if len(items) < 2 or axis == len(items[0][0]):
        return items
    return _Branch(items, axis)
