"""Whether two arrays hold the same bits, and how far apart they are where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import numpy as np

from megatron.bridge.tensors.arrays import Array, same_bits, words

_COUNTED_AT_ONCE = 1 << 16
"""Elements. Counting takes about 30 bytes for each."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two arrays are apart.

    Attributes:
        elements: how many have other bits.
        max_abs: the largest absolute difference; infinite where a NaN or an infinity differs.
    """

    elements: int = 0
    max_abs: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.elements + other.elements, max(self.max_abs, other.max_abs))


def difference(a: Array, b: Array) -> Difference:
    """Compare arrays of one shape and dtype as bytes: equal NaNs are equal, -0.0 is not 0.0.

    Memory beside them is an eighth of one, and 2 MiB where they differ; an array that is not
    contiguous is copied.
    """
    total = Difference()
    a, b = a.reshape(-1), b.reshape(-1)
    if not same_bits(a, b):
        for start in range(0, a.size, _COUNTED_AT_ONCE):
            part, other = (array[start : start + _COUNTED_AT_ONCE] for array in (a, b))
            if not same_bits(part, other):
                total += _counted(part, other)
    return total


def _counted(a: Array, b: Array) -> Difference:
    unequal = words(a) != words(b)
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        largest = float(np.abs(a[unequal].astype(wide) - b[unequal].astype(wide)).max())
    return Difference(int(np.count_nonzero(unequal)), largest if isfinite(largest) else inf)
