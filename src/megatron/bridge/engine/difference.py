"""Whether two tensors hold the same bits, and how far apart they are where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import numpy as np
import torch

_COUNTED_AT_ONCE = 1 << 16
"""Elements. Counting takes about 30 bytes for each."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two tensors are apart.

    Attributes:
        elements: how many have other bits.
        max_abs: the largest absolute difference; infinite where a NaN or an infinity differs.
    """

    elements: int = 0
    max_abs: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.elements + other.elements, max(self.max_abs, other.max_abs))


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare tensors of one shape and dtype as bytes: equal NaNs are equal, -0.0 is not 0.0.

    Memory beside them is an eighth of one, and 2 MiB where they differ; a tensor that is not
    contiguous is copied.
    """
    total = Difference()
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    if not _same_bytes(a, b):
        for part, other in zip(a.split(_COUNTED_AT_ONCE), b.split(_COUNTED_AT_ONCE), strict=True):
            if not _same_bytes(part, other):
                total += _counted(part, other)
    return total


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether contiguous tensors of one length are equal. By words, as fast as memory is read."""
    here, there = (tensor.view(torch.uint8).numpy() for tensor in (a, b))
    whole = here.size - here.size % 8
    return np.array_equal(here[whole:], there[whole:]) and np.array_equal(
        here[:whole].view(np.uint64), there[:whole].view(np.uint64)
    )


def _counted(a: torch.Tensor, b: torch.Tensor) -> Difference:
    bits = _INTEGERS[a.element_size()]
    unequal = a.view(bits) != b.view(bits)
    wide = torch.complex128 if a.is_complex() else torch.float64
    largest = (a[unequal].to(wide) - b[unequal].to(wide)).abs().max().item()
    return Difference(int(unequal.sum()), largest if isfinite(largest) else inf)
