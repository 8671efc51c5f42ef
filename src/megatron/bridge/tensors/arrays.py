"""Boxes of elements in memory: numpy arrays, whose dtype is numpy's own or one of ml_dtypes.

Elements are moved as integers of their width. numpy copies those in tight loops and lets other
threads run meanwhile; of a dtype that is not its own it does neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.tensors.boxes import Shape

type Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""Elements of any dtype that files have."""

_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}

_ROWS_AT_ONCE = 48


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

    Where the target is transposed a few rows go at a time, which stay in a cache: half the time.
    """
    given, wanted = words(source), words(target)
    if wanted.ndim < 2 or wanted.strides[-1] == wanted.itemsize:
        wanted[...] = given
        return
    for matrix in np.ndindex(given.shape[:-2]):
        rows, columns = given[matrix], wanted[matrix]
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            columns[first : first + _ROWS_AT_ONCE] = rows[first : first + _ROWS_AT_ONCE]


def same_bits(a: Array, b: Array) -> bool:
    """Whether arrays of one shape and dtype are equal as bytes. As fast as memory is read."""
    if not (a.flags.c_contiguous and b.flags.c_contiguous):
        return np.array_equal(words(a), words(b))
    here, there = (array.reshape(-1).view(np.uint8) for array in (a, b))
    whole = here.size - here.size % 8
    return np.array_equal(here[whole:], there[whole:]) and np.array_equal(
        here[:whole].view(np.uint64), there[:whole].view(np.uint64)
    )
