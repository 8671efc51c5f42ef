"""Torch tensors in memory where the code under test reads files: through memory that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron.bridge.dtypes import numpy_dtype, safetensors_dtype
from megatron.bridge.tensors.arrays import Array, copy
from megatron.bridge.tensors.boxes import Box, slices
from megatron.bridge.tensors.torch_views import as_array


def put(tensor: torch.Tensor, out: Array) -> None:
    """Fill `out`, of the same shape and dtype, with the elements of a tensor."""
    array = as_array(tensor)
    assert (out.shape, out.dtype) == (array.shape, array.dtype)
    copy(array, out)


class InMemory:
    """Tensors by name as a Source."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def dtype_of(self, name: str) -> str:
        return safetensors_dtype(self.tensors[name].dtype)

    def read_into(self, name: str, box: Box, out: Array) -> None:
        put(self.tensors[name][slices(box)], out)


def numpy_dtype_named(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy dtype of what torch calls by this name."""
    return numpy_dtype(safetensors_dtype(dtype))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their width: equal NaNs are equal, -0.0 is not 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])
