"""Boxes: half-open index ranges, one per axis, and the proof that a set of them tiles a tensor.

A box of a tensor of shape ``(s0, s1, ...)`` is ``((a0, b0), (a1, b1), ...)`` with
``0 <= a < b <= s`` on every axis. The box of a scalar is ``()``. Nothing here knows of tensors,
files or processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod

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
        start, stop = max(a_start, b_start), min(a_stop, b_stop)
        if start >= stop:
            return None
        shared.append((start, stop))
    return tuple(shared)


def relative(box: Box, origin: Box) -> Box:
    """`box` in coordinates whose zero is the lower corner of `origin`."""
    return tuple(
        (start - zero, stop - zero) for (start, stop), (zero, _) in zip(box, origin, strict=True)
    )


def slices(box: Box) -> tuple[slice, ...]:
    """The index that picks a box out of a tensor or a safetensors slice."""
    return tuple(slice(start, stop) for start, stop in box)


def format_box(box: Box) -> str:
    """``[0:4, 8:16]``, as it is written in Python."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def tiling_faults(shape: Shape, boxes: Iterable[Box]) -> Iterator[str]:
    """Why `boxes` do not tile a tensor of `shape` exactly: gaps, overlaps, boxes that stick out.

    Nothing is yielded for an exact tiling. The tensor is cut along its first axis at every bound
    of every box, and each slab is looked at in the same way along the next axis, so the work is
    linear in the number of boxes wherever they form a grid.
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
    yield from _slab_faults(limits, 0, inside)


def _slab_faults(limits: Box, axis: int, boxes: list[Box]) -> Iterator[str]:
    if axis == len(limits):
        if len(boxes) > 1:
            yield f"{format_box(limits)} is filled {len(boxes)} times"
        elif not boxes:
            yield f"{format_box(limits)} is not filled"
        return
    start, stop = limits[axis]
    cuts = sorted({start, stop, *(bound for box in boxes for bound in box[axis])})
    slab_of = {cut: index for index, cut in enumerate(cuts)}
    slabs: list[list[Box]] = [[] for _ in cuts[:-1]]
    for box in boxes:
        for slab in range(slab_of[box[axis][0]], slab_of[box[axis][1]]):
            slabs[slab].append(box)
    for low, high, members in zip(cuts[:-1], cuts[1:], slabs, strict=True):
        slab_limits = (*limits[:axis], (low, high), *limits[axis + 1 :])
        if not members:
            yield f"{format_box(slab_limits)} is not filled"
        elif len(members) > 1 or members[0][axis + 1 :] != slab_limits[axis + 1 :]:
            yield from _slab_faults(slab_limits, axis + 1, members)


class BoxIndex[Item]:
    """Finds, among many boxed items of one tensor, those that overlap a box.

    Items are kept in a tree with one level per axis, so a look-up in a grid touches little more
    than what it returns.
    """

    def __init__(self, items: Iterable[tuple[Box, Item]]) -> None:
        self._root = _level(list(items), 0)

    def overlapping(self, box: Box) -> Iterator[tuple[Box, Item]]:
        """(shared part, item) for every item whose box overlaps `box`."""
        for item_box, item in _descend(self._root, box, 0):
            if (shared := intersect(item_box, box)) is not None:
                yield shared, item


type _Leaf[Item] = list[tuple[Box, Item]]
type _Level[Item] = _Leaf[Item] | dict[Interval, _Level[Item]]


def _level[Item](items: _Leaf[Item], axis: int) -> _Level[Item]:
    if len(items) < 2 or axis == len(items[0][0]):
        return items
    groups: dict[Interval, _Leaf[Item]] = {}
    for box, item in items:
        groups.setdefault(box[axis], []).append((box, item))
    return {interval: _level(group, axis + 1) for interval, group in groups.items()}


def _descend[Item](level: _Level[Item], box: Box, axis: int) -> Iterator[tuple[Box, Item]]:
    if isinstance(level, list):
        yield from level
        return
    start, stop = box[axis]
    for (low, high), below in level.items():
        if low < stop and start < high:
            yield from _descend(below, box, axis + 1)
