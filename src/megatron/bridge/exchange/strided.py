"""Elements of a tensor in strided order, as boxes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from megatron.bridge.tensors.boxes import Box, Shape, intersect


class Axis(NamedTuple):
    """A loop over elements of two memories at once.

    Attributes:
        size: how many steps.
        stride: of a step in one memory.
        other: of a step in the other one.
    """

    size: int
    stride: int
    other: int


class Boxed(NamedTuple):
    """A box, and where its elements are in the other memory.

    Attributes:
        box: of the tensor.
        offset: of its first element in the other memory.
        strides: in the other memory, of each axis of the box; 0 of an axis of extent 1.
    """

    box: Box
    offset: int
    strides: tuple[int, ...]

    def part(self, box: Box) -> Boxed:
        """The same of a part of the box."""
        steps = zip(box, self.box, self.strides, strict=True)
        offset = sum((start - zero) * stride for (start, _), (zero, _), stride in steps)
        return Boxed(box, self.offset + offset, self.strides)


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    """Of a tensor in row-major order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))[: len(shape)]


def boxes(shape: Shape, offset: int, axes: Sequence[Axis], other_offset: int) -> Iterator[Boxed]:
    """The boxes of a tensor in row-major order that hold some of its elements.

    As few as the loops allow: those that continue one another in both memories are one axis.

    Args:
        shape: of the tensor.
        offset: of the first element.
        axes: the loops; none has a stride of 0.
        other_offset: of the first element in the other memory.
    """
    strides = contiguous_strides(shape)
    axis_of = {stride: axis for axis, stride in enumerate(strides) if shape[axis] > 1}
    corner = [offset // stride % size for size, stride in zip(shape, strides, strict=True)]
    box = [(start, start + 1) for start in corner]
    others = [0] * len(shape)
    loops = [one for one in axes if one.size > 1]
    for index, (size, stride, other) in enumerate(loops):
        rest = [*loops[:index], *loops[index + 1 :]]
        axis = axis_of.get(stride)
        if axis is None or others[axis]:
            yield from _without_axis(shape, offset, loops[index], rest, other_offset)
            return
        room = shape[axis] - corner[axis]
        if size <= room:
            box[axis] = (corner[axis], corner[axis] + size)
            others[axis] = other
        elif room == shape[axis] and size % room == 0:
            rows = Axis(size // room, stride * room, other * room)
            columns = Axis(room, stride, other)
            yield from boxes(shape, offset, [*rest, rows, columns], other_offset)
            return
        else:  # it goes on in the next row
            for begin, end in pairwise((0, room, size)):
                cut = [*rest, Axis(end - begin, stride, other)]
                yield from boxes(shape, offset + begin * stride, cut, other_offset + begin * other)
            return
    yield Boxed(tuple(box), other_offset, tuple(others))


def _without_axis(
    shape: Shape, offset: int, loop: Axis, rest: list[Axis], other_offset: int
) -> Iterator[Boxed]:
    """The boxes where one of the loops steps along no axis of the tensor."""
    for index, inner in enumerate(rest):
        if (loop.stride, loop.other) == (inner.size * inner.stride, inner.size * inner.other):
            joined = Axis(loop.size * inner.size, inner.stride, inner.other)
            others = [*rest[:index], joined, *rest[index + 1 :]]
            yield from boxes(shape, offset, others, other_offset)
            return
    for step in range(loop.size):
        yield from boxes(shape, offset + step * loop.stride, rest, other_offset + step * loop.other)


def without(box: Box, taken: Box) -> Iterator[Box]:
    """Boxes that tile what is left of a box where another one is taken away."""
    shared = intersect(box, taken)
    if shared is None:
        yield box
        return
    left = list(box)
    for axis, ((start, stop), (begin, end)) in enumerate(zip(box, shared, strict=True)):
        for edge in ((start, begin), (end, stop)):
            if edge[0] < edge[1]:
                yield (*left[:axis], edge, *left[axis + 1 :])
        left[axis] = (begin, end)
