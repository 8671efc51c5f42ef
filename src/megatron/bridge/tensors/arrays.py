"""Boxes of elements in memory: numpy arrays, whose dtype is numpy's own or one of ml_dtypes.

Elements are moved as integers of their width. numpy copies those in tight loops and lets other
threads run meanwhile; of a dtype that is not its own it does neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.tensors.boxes import Shape

type Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""Elements of any dtype that files have."""

_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}

_CACHE_LINE = 64
_TILE_ROWS, _TILE_COLUMNS = 128, 1024
"""Of what is turned at once; in 2 bytes an element it stays in a processor's second cache."""


def empty(shape: Shape, dtype: str) -> Array:
    """New memory for elements of a dtype ("BF16"), with anything in it."""
    return np.empty(shape, numpy_dtype(dtype))


def array_over(memory: memoryview, shape: Shape, dtype: str) -> Array:
    """An array that lies in `memory`, which is just long enough for it."""
    return np.frombuffer(memory, numpy_dtype(dtype)).reshape(shape)


def memory_of(array: Array) -> memoryview[Any]:
    """The bytes of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))


def words(array: Array) -> Array:
    """The same memory as unsigned integers of the elements' width."""
    integers: Array = array.view(_WORDS[array.itemsize])
    return integers


def copy(source: Array, target: Array) -> None:
    """Copy to an array of the same shape and dtype, with any strides on either side.

    A matrix is turned tile by tile. The rows of a tile are brought together first, at a distance
    that is no power of 2: at such distances, which matrices have, elements of one column displace
    each other from the processor's cache, and a copy takes up to five times as long.
    """
    given, wanted = words(source), words(target)
    if wanted.ndim >= 2 and _rows_lie_together(wanted) and _columns_lie_together(given):
        given, wanted = given.swapaxes(-1, -2), wanted.swapaxes(-1, -2)
    if wanted.ndim < 2 or not (_rows_lie_together(given) and _columns_lie_together(wanted)):
        wanted[...] = given
        return
    row_bytes = _TILE_COLUMNS * given.itemsize + _CACHE_LINE
    memory = np.empty((_TILE_ROWS, row_bytes // given.itemsize), given.dtype)
    for matrix in np.ndindex(given.shape[:-2]):
        rows, columns = given[matrix], wanted[matrix]
        for tile in _tiles(rows.shape):
            part = rows[tile]
            together = memory[: part.shape[0], : part.shape[1]]
            together[...] = part
            columns[tile] = together


def _rows_lie_together(array: Array) -> bool:
    return array.strides[-1] == array.itemsize


def _columns_lie_together(array: Array) -> bool:
    return array.strides[-2] == array.itemsize and not _rows_lie_together(array)


def _tiles(shape: Shape) -> Iterator[tuple[slice, slice]]:
    for row in range(0, shape[0], _TILE_ROWS):
        for column in range(0, shape[1], _TILE_COLUMNS):
            yield slice(row, row + _TILE_ROWS), slice(column, column + _TILE_COLUMNS)


def same_bits(a: Array, b: Array) -> bool:
    """Whether arrays of one shape and dtype are equal as bytes. As fast as memory is read."""
    if not (a.flags.c_contiguous and b.flags.c_contiguous):
        return np.array_equal(words(a), words(b))
    here, there = (array.reshape(-1).view(np.uint8) for array in (a, b))
    whole = here.size - here.size % 8
    return np.array_equal(here[whole:], there[whole:]) and np.array_equal(
        here[:whole].view(np.uint64), there[:whole].view(np.uint64)
    )
