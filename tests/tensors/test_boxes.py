"""Boxes: the tiling proof finds every gap and overlap, the index finds every neighbour."""

import itertools
import re
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.bridge.tensors.boxes import (
    Box,
    BoxIndex,
    Shape,
    intersect,
    joined,
    part_of,
    relative,
    row_blocks,
    slices,
    tiling_faults,
    volume,
)

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A shape and boxes that tile it, made by cutting boxes in two again and again."""
    shape = draw(shapes)
    boxes: list[Box] = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 8))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axes = [axis for axis, (start, stop) in enumerate(box) if stop - start > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = draw(st.sampled_from(axes))
        start, stop = box[axis]
        cut = draw(st.integers(start + 1, stop - 1))
        boxes.append((*box[:axis], (start, cut), *box[axis + 1 :]))
        boxes.append((*box[:axis], (cut, stop), *box[axis + 1 :]))
    return shape, draw(st.permutations(boxes))


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, stop) for start, stop in box)))


@given(tilings())
@settings(deadline=None)
def test_a_tiling_has_no_faults(tiling: tuple[Shape, list[Box]]) -> None:
    shape, boxes = tiling
    assert list(tiling_faults(shape, boxes)) == []
    assert sum(map(volume, boxes)) == prod(shape)


@given(tilings(), st.data())
@settings(deadline=None)
def test_a_missing_box_is_a_gap(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = tiling
    boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
    assert any("not filled" in fault for fault in tiling_faults(shape, boxes))


@given(tilings(), st.data())
@settings(deadline=None)
def test_a_box_twice_is_an_overlap(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = tiling
    boxes.append(data.draw(st.sampled_from(boxes)))
    assert any("filled 2 times" in fault for fault in tiling_faults(shape, boxes))


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([((0, 2), (0, 4))], r"\[0:2, 0:4\] is empty or sticks out of shape \(2, 3\)"),
        ([((0, 2), (0, 3)), ((1, 1), (0, 3))], "is empty or sticks out"),
        ([((0, 2),)], "does not have the 2 axes"),
        ([((0, 1), (0, 3)), ((1, 2), (1, 3))], r"\[1:2, 0:1\] is not filled"),
        ([((0, 2), (0, 2)), ((0, 2), (1, 3))], r"\[0:2, 1:2\] is filled 2 times"),
    ],
)
def test_faults_name_the_place(boxes: list[Box], fault: str) -> None:
    found = list(tiling_faults((2, 3), boxes))
    assert len([one for one in found if re.search(fault, one)]) == 1


@given(tilings(), st.data())
@settings(deadline=None)
def test_the_index_finds_what_overlaps(
    tiling: tuple[Shape, list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    spans = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        spans.append((start, data.draw(st.integers(start + 1, size))))
    query = tuple(spans)
    found = dict(BoxIndex([(box, number) for number, box in enumerate(boxes)]).overlapping(query))
    assert set().union(*map(cells, found)) == cells(query)
    for shared, number in found.items():
        assert shared == intersect(boxes[number], query)


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A shape and boxes in it that overlap, repeat and leave gaps as they like."""
    shape = draw(shapes)
    spans = [
        st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(
            lambda span: span[0] < span[1]
        )
        for size in shape
    ]
    return shape, draw(st.lists(st.tuples(*spans), min_size=1, max_size=12))


@given(shapes_and_boxes(), st.data())
@settings(deadline=None)
def test_the_index_finds_boxes_that_overlap_each_other(
    drawn: tuple[Shape, list[Box]], data: st.DataObject
) -> None:
    _, boxes = drawn
    query = data.draw(st.sampled_from(boxes))
    index = BoxIndex([(box, number) for number, box in enumerate(boxes)])
    expected = {
        (shared, number)
        for number, box in enumerate(boxes)
        if (shared := intersect(box, query)) is not None
    }
    assert set(index.overlapping(query)) == expected


def test_relative() -> None:
    assert relative(((3, 5), (10, 12)), ((2, 9), (10, 20))) == ((1, 3), (0, 2))


@given(st.lists(st.integers(0, 9), max_size=4).map(tuple), st.integers(1, 200))
@settings(deadline=None)
def test_row_blocks_tile_a_tensor_in_the_order_of_its_data(shape: Shape, max_bytes: int) -> None:
    found = list(row_blocks(shape, 2, max_bytes))
    if 0 in shape:
        assert found == []
        return
    numbered = np.arange(prod(shape)).reshape(shape)
    position = 0
    for box in found:
        block = numbered[slices(box)].ravel()
        assert block.tolist() == list(range(position, position + block.size))
        assert block.size * 2 <= max(max_bytes, 2)
        position += block.size
    assert position == prod(shape)


def test_row_blocks_are_as_long_as_they_may_be() -> None:
    assert list(row_blocks((), 4, 1)) == [()]
    assert list(row_blocks((5, 3), 2, 30)) == [((0, 5), (0, 3))]
    assert list(row_blocks((5, 3), 2, 29)) == [((0, 3), (0, 3)), ((3, 5), (0, 3))]  # no sliver
    assert list(row_blocks((2, 5, 3), 2, 13)) == [
        ((e, e + 1), (start, stop), (0, 3))
        for e in (0, 1)
        for start, stop in ((0, 2), (2, 4), (4, 5))
    ]
    assert list(row_blocks((2, 3), 4, 8)) == [
        ((0, 1), (0, 2)),
        ((0, 1), (2, 3)),
        ((1, 2), (0, 2)),
        ((1, 2), (2, 3)),
    ]


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9)),
    st.integers(1, 300),
    st.integers(2, 8),
)
@settings(deadline=None)
def test_row_blocks_begin_at_multiples_of_rows(shape: Shape, max_bytes: int, multiple: int) -> None:
    found = list(row_blocks(shape, 1, max_bytes, multiple))
    assert list(tiling_faults(shape, found)) == []
    for _, (start, stop), columns in found:
        assert start % multiple == 0
        assert stop % multiple == 0 or stop == shape[1]
        assert columns == (0, shape[2])
    for box in found:
        assert volume(box) <= max(max_bytes, multiple * shape[2])


def test_row_blocks_hold_several_whole_multiples_of_rows() -> None:
    assert [rows for rows, _ in row_blocks((29, 10), 1, 99, 4)] == [
        (0, 8),
        (8, 16),
        (16, 24),
        (24, 29),
    ]


def test_neighbours_are_joined() -> None:
    """Experts and rows of a grid; a box apart stays as it is."""
    grid = [((e, e + 1), (row, row + 3), (0, 7)) for row in (2, 5) for e in range(4)]
    assert joined([*grid, grid[0]]) == [((0, 4), (2, 8), (0, 7))]
    assert joined([*grid[:3], ((6, 7), (2, 5), (0, 7))]) == [
        ((0, 3), (2, 5), (0, 7)),
        ((6, 7), (2, 5), (0, 7)),
    ]
    assert joined([((0, 2), (0, 3)), ((2, 4), (0, 2))]) == [((0, 2), (0, 3)), ((2, 4), (0, 2))]
    assert joined([()]) == [()]
    assert joined([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=3), st.integers(1, 40))
@settings(deadline=None)
def test_parts_tile_a_box(axes: list[tuple[int, int]], count: int) -> None:
    box = tuple((start, start + size) for start, size in axes)
    found = [part_of(box, number, count) for number in range(count)]
    parts = [part for part in found if part is not None]
    shape = tuple(size for _, size in axes)
    assert list(tiling_faults(shape, [relative(part, box) for part in parts])) == []
    assert parts == sorted(parts)
    if count <= volume(box):
        assert max(map(volume, parts)) <= 2 * -(-volume(box) // count)
    if not axes or axes[0][1] % count == 0:
        assert len({volume(part) for part in parts}) == 1
