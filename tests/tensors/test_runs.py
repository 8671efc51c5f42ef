"""Runs of a box against numpy's own order of elements."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.bridge.tensors.boxes import Box, slices
from megatron.bridge.tensors.runs import Runs, run_start


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape, and a box in it that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    bounds = [sorted((draw(st.integers(0, n - 1)), draw(st.integers(1, n)))) for n in shape]
    return shape, tuple((start, max(stop, start + 1)) for start, stop in bounds)


@given(boxes())
@settings(deadline=None)
def test_runs_are_the_elements_of_the_box_in_order(drawn: tuple[tuple[int, ...], Box]) -> None:
    shape, box = drawn
    expected = np.arange(np.prod(shape, dtype=int)).reshape(shape)[slices(box)].reshape(-1)
    runs = Runs(shape, box)
    starts = list(runs.starts())
    assert len(starts) == runs.count
    found = [start + step for start in starts for step in range(runs.length)]
    assert found == expected.tolist()
    contiguous = bool((np.diff(expected) == 1).all())
    assert run_start(shape, box) == (int(expected[0]) if contiguous else None)
