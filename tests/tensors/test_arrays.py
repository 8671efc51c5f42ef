"""Arrays of every dtype that files have: numpy's view of memory, and torch's of the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron.bridge.dtypes import (
    DTYPE_NAMES,
    dtype_of,
    itemsize,
    numpy_dtype,
    safetensors_dtype,
    torch_dtype,
)
from megatron.bridge.errors import CheckpointError
from megatron.bridge.tensors.arrays import (
    Array,
    array_over,
    copy,
    empty,
    memory_of,
    same_bits,
    words,
)
from megatron.bridge.tensors.source import read_box
from megatron.bridge.tensors.torch_views import as_array, as_torch, numpy_dtype_of, read_tensor
from tensors_in_memory import InMemory, bits


def numbers(dtype: str, *shape: int) -> torch.Tensor:
    """Elements of all kinds of bytes; of BOOL, of those that it has."""
    count = torch.Size(shape).numel() * itemsize(dtype)
    found = torch.arange(1, count + 1) * 37 % (2 if dtype == "BOOL" else 251)
    return found.to(torch.uint8).view(torch_dtype(dtype)).view(shape)


def layouts(dtype: str) -> Iterator[torch.Tensor]:
    yield numbers(dtype)
    yield numbers(dtype, 7)
    yield numbers(dtype, 3, 5)
    yield numbers(dtype, 0, 5)
    yield numbers(dtype, 4, 0, 3)
    yield numbers(dtype, 3, 5).t()
    yield numbers(dtype, 4, 6, 10)[1:, ::2, 3::3]
    yield numbers(dtype, 4, 6, 10).permute(2, 0, 1)
    yield numbers(dtype, 6).expand(3, 6)
    yield numbers(dtype, 3).as_strided((1, 3, 1), (99, 1, 7))


# --- dtypes ---


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_a_dtype_of_numpy_for_every_name(name: str) -> None:
    dtype = numpy_dtype(name)
    assert dtype.itemsize == itemsize(name) == torch_dtype(name).itemsize
    assert f"torch.{dtype.name}" == str(torch_dtype(name))
    assert dtype_of(dtype) == name
    assert dtype.isnative
    assert numpy_dtype_of(torch.empty(2, dtype=torch_dtype(name))) == dtype


@pytest.mark.parametrize("name", [name for name in DTYPE_NAMES if itemsize(name) == 1])
def test_every_value_of_a_byte_is_what_torch_says(name: str) -> None:
    every = torch.arange(2 if name == "BOOL" else 256).to(torch.uint8).view(torch_dtype(name))
    found = torch.from_numpy(as_array(every).astype(np.float64))
    assert torch.equal(found.isnan(), every.double().isnan())
    assert torch.equal(found.nan_to_num(), every.double().nan_to_num())


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_value_of_two_bytes_is_what_torch_says(name: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch_dtype(name))
    found = torch.from_numpy(as_array(every).astype(np.float32))
    assert torch.equal(found.isnan(), every.isnan())
    assert torch.equal(bits(found)[~every.isnan()], bits(every.float())[~every.isnan()])


def test_a_name_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="dtype 'F4' is not supported"):
        numpy_dtype("F4")


# --- torch and numpy ---


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_an_array_is_the_memory_of_a_tensor(name: str) -> None:
    for tensor in layouts(name):
        array = as_array(tensor)
        assert (array.shape, array.dtype) == (tuple(tensor.shape), numpy_dtype(name))
        assert array.tobytes() == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        back = as_torch(array)
        assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
        if tensor.numel():
            assert array.ctypes.data == tensor.data_ptr() == back.data_ptr()
            long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
            strides = [tensor.stride(axis) for axis in long]
            assert [array.strides[axis] // itemsize(name) for axis in long] == strides
            assert [back.stride(axis) for axis in long] == strides


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_what_is_written_to_one_is_in_the_other(name: str) -> None:
    tensor = torch.zeros(4, 6, dtype=torch.uint8).repeat(1, itemsize(name)).view(torch_dtype(name))
    part = tensor.t()[1::2]
    value = numbers(name, 4, 3).t()
    copy(as_array(value), as_array(part))
    assert torch.equal(bits(part), bits(value))
    assert not bits(tensor.t()[::2]).any()
    array = empty((2, 3), name)
    as_torch(array).copy_(value[:2, :3])
    assert array.tobytes() == as_array(value[:2, :3].contiguous()).tobytes()


def test_a_parameter_is_seen_without_its_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    as_array(parameter)[1, 0] = 7
    assert parameter.detach().tolist() == [[1, 1], [7, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float4_e2m1fn_x2])
def test_a_dtype_that_files_do_not_have(dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=str(dtype).removeprefix("torch.")):
        as_array(torch.empty(3, dtype=dtype))


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_boxes_in_new_memory(name: str) -> None:
    source = InMemory({"a": numbers(name, 4, 7), "b": numbers(name)})
    box = ((1, 3), (2, 7))
    expected = source.tensors["a"][1:3, 2:7]
    array, tensor = read_box(source, "a", box), read_tensor(source, "a", box)
    for found in (as_torch(array), tensor):
        assert found.dtype == torch_dtype(name)
        assert torch.equal(bits(found), bits(expected))
        assert found.is_contiguous()
    assert torch.equal(bits(read_tensor(source, "b", ())), bits(source.tensors["b"]))
    assert safetensors_dtype(tensor.dtype) == name


# --- memory ---


@pytest.mark.parametrize("shape", [(), (3, 5), (0, 5), (1,)], ids=str)
@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_an_array_over_memory(name: str, shape: tuple[int, ...]) -> None:
    tensor = numbers(name, *shape)
    memory = bytearray(tensor.nbytes)
    array = array_over(memoryview(memory), shape, name)
    assert (array.shape, array.dtype) == (shape, numpy_dtype(name))
    copy(as_array(tensor), array)
    assert memory == as_array(tensor).tobytes()
    memory_of(array)[:] = bytes(len(memory))
    assert not any(memory)


def test_the_memory_of_what_is_contiguous_is_not_copied() -> None:
    array = as_array(numbers("BF16", 3).as_strided((1, 3, 1), (99, 1, 7)))
    assert array.flags.c_contiguous
    memory_of(array)[:2] = b"\0\0"
    assert words(array)[0, 0, 0] == 0


def test_words_are_of_the_same_memory() -> None:
    for name in DTYPE_NAMES:
        array = as_array(numbers(name, 5, 4)).T[1:]
        integers = words(array)
        assert integers.dtype == np.dtype(f"u{itemsize(name)}")
        assert integers.strides == array.strides
        assert np.shares_memory(integers, array)


# --- copying and comparing ---


def views(shape: tuple[int, ...]) -> Iterator[Array]:
    """Memory of a shape: contiguous, transposed, every second element."""
    yield empty(shape, "BF16")
    yield np.moveaxis(empty((*shape[1:], shape[0]), "BF16"), -1, 0)
    yield empty((*shape[:-2], shape[-1], shape[-2]), "BF16").swapaxes(-1, -2)
    yield empty(tuple(2 * size for size in shape), "BF16")[
        tuple(slice(None, None, 2) for _ in shape)
    ]


@pytest.mark.parametrize("shape", [(3, 5), (131, 1070), (1027, 6), (2, 3, 197, 5), (4, 0)], ids=str)
def test_copying_between_any_strides(shape: tuple[int, ...]) -> None:
    expected = numbers("BF16", *shape)
    for source in views(shape):
        as_torch(source).copy_(expected)
        for target in views(shape):
            words(target)[...] = 0x1234
            copy(source, target)
            assert torch.equal(bits(as_torch(target)), bits(expected))


def test_bits_are_compared() -> None:
    for name in DTYPE_NAMES:
        for size in (1, 5, 8, 1003):
            one, other = as_array(numbers(name, size)), as_array(numbers(name, size))
            assert same_bits(one, other)
            assert same_bits(one[::-1], other[::-1])
            for place in {0, size // 2, size - 1}:
                changed = other.copy()
                memory_of(changed)[place * itemsize(name)] ^= 1
                assert not same_bits(one, changed)
                assert not same_bits(one[::-1], changed[::-1])
    nan, zero = np.array([np.nan, 0.0]), np.array([0.0, -0.0])
    assert same_bits(nan, nan.copy())
    assert not same_bits(zero[:1], zero[1:])
    assert same_bits(np.float32(2.0)[()].reshape(()), np.array(2.0, np.float32))
    assert same_bits(empty((0, 3), "F32"), empty((0, 3), "F32"))
