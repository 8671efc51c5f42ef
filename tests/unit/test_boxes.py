"""Boxes: the tiling proof finds every gap and overlap, the index finds every neighbour."""

import itertools
import re
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.bridge.models.conversion.boxes import (
    Box,
    BoxIndex,
    Shape,
    intersect,
    relative,
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
def test_a_tiling_has_no_faults(tiling: tuple[Shape, list[Box]]) -> None:
    shape, boxes = tiling
    assert list(tiling_faults(shape, boxes)) == []
    assert sum(map(volume, boxes)) == prod(shape)


@given(tilings(), st.data())
def test_a_missing_box_is_a_gap(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = tiling
    boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
    assert any("not filled" in fault for fault in tiling_faults(shape, boxes))


@given(tilings(), st.data())
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


def test_relative() -> None:
    assert relative(((3, 5), (10, 12)), ((2, 9), (10, 20))) == ((1, 3), (0, 2))
