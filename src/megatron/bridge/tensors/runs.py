"""Where the elements of a box lie among those of its tensor, in row-major order."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from megatron.bridge.tensors.boxes import Box


class Runs:
    """The contiguous runs of a non-empty box, in row-major order, all of one length.

    Args:
        shape: of the tensor.
        box: of the tensor.

    Attributes:
        length: of a run, in elements.
        count: how many there are.
    """

    def __init__(self, shape: Sequence[int], box: Box) -> None:
        strides = [prod(shape[axis + 1 :]) for axis in range(len(box))]
        restricted = [axis for axis, size in enumerate(shape) if box[axis] != (0, size)]
        self._base = 0
        self._outer: list[tuple[range, int]] = []
        self.length = prod(shape)
        if restricted:
            # Below the last restricted axis everything is taken, so a run spans that axis's range.
            last = restricted[-1]
            start, stop = box[last]
            self._base = start * strides[last]
            self.length = (stop - start) * strides[last]
            self._outer = [(range(*box[axis]), strides[axis]) for axis in range(last)]
        self.count = prod(len(indexes) for indexes, _ in self._outer)

    def starts(self) -> Iterator[int]:
        """How many elements of the tensor lie before each."""
        for outer in product(*(indexes for indexes, _ in self._outer)):
            steps = zip(outer, self._outer, strict=True)
            yield self._base + sum(index * stride for index, (_, stride) in steps)


def run_start(shape: Sequence[int], box: Box) -> int | None:
    """How many elements lie before a non-empty box that is one run; None for one of several."""
    runs = Runs(shape, box)
    return next(runs.starts()) if runs.count == 1 else None
