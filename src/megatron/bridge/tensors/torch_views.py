"""Torch tensors and numpy arrays that share memory: where files meet a live model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron.bridge.dtypes import dtype_of, numpy_dtype, safetensors_dtype, torch_dtype
from megatron.bridge.tensors.arrays import Array, words
from megatron.bridge.tensors.boxes import Box, box_shape
from megatron.bridge.tensors.source import Source

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def numpy_dtype_of(tensor: torch.Tensor) -> np.dtype[Any]:
    """The numpy dtype of a tensor. Raises CheckpointError: files have no such dtype."""
    return numpy_dtype(safetensors_dtype(tensor.dtype))


def as_array(tensor: torch.Tensor) -> Array:
    """The memory of a tensor on the CPU as an array of the same shape, strides and dtype.

    Raises:
        CheckpointError: files have no such dtype.
    """
    dtype = numpy_dtype_of(tensor)
    array: Array = tensor.detach().view(_INTEGERS[dtype.itemsize]).numpy()
    return array.view(dtype)


def as_torch(array: Array) -> torch.Tensor:
    """The memory of an array as a tensor on the CPU of the same shape, strides and dtype."""
    signed = words(array).view(np.dtype(f"i{array.itemsize}" if array.itemsize > 1 else "u1"))
    return torch.from_numpy(signed).view(torch_dtype(dtype_of(array.dtype)))


def read_tensor(source: Source, name: str, box: Box) -> torch.Tensor:
    """One box of a tensor in new memory of the CPU, in the dtype in which it is read."""
    tensor = torch.empty(box_shape(box), dtype=torch_dtype(source.dtype_of(name)), device="cpu")
    source.read_into(name, box, as_array(tensor))
    return tensor
