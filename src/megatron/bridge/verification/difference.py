"""Whether two tensors hold the same bits, and how far apart they are where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite, prod

import torch

from megatron.bridge.dtypes import itemsize
from megatron.bridge.models.conversion.boxes import Box, Shape, full_box

BLOCK_BYTES = 64 << 20
"""Tensors are compared in blocks of about this size, so that memory does not grow with them."""


@dataclass(frozen=True, slots=True)
class Difference:
    """elements: how many have other bits. max_abs: infinite where a NaN or infinity differs."""

    elements: int = 0
    max_abs: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.elements + other.elements, max(self.max_abs, other.max_abs))


def blocks(shape: Shape, dtype: str) -> Iterator[Box]:
    """Boxes of at most BLOCK_BYTES that tile a tensor of `dtype` ("BF16"), first axis by first."""
    if 0 in shape:
        return
    limits = full_box(shape)
    axis, slab = 0, prod(shape) * itemsize(dtype)
    if not shape or slab <= BLOCK_BYTES:
        yield limits
        return
    while axis < len(shape) - 1 and slab // shape[axis] > BLOCK_BYTES:
        slab //= shape[axis]
        axis += 1
    # Every axis before `axis` is walked through in steps of one, `axis` in the largest steps.
    step = max(1, BLOCK_BYTES // (slab // shape[axis]))
    for leading in _indices(shape[:axis]):
        fixed = tuple((index, index + 1) for index in leading)
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            yield (*fixed, (start, stop), *limits[axis + 1 :])


def _indices(shape: Shape) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for index in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (index, *rest)


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare tensors of one shape and dtype as bytes: equal NaNs are equal, -0.0 is not 0.0."""
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    a_bytes, b_bytes = a.view(torch.uint8), b.view(torch.uint8)
    if torch.equal(a_bytes, b_bytes):
        return Difference()
    width = a.element_size()
    unequal = (a_bytes.view(-1, width) != b_bytes.view(-1, width)).any(dim=1)
    wide = torch.complex128 if a.is_complex() else torch.float64
    largest = (a[unequal].to(wide) - b[unequal].to(wide)).abs().max().item()
    return Difference(int(unequal.sum()), largest if isfinite(largest) else inf)
