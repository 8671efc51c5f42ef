"""The header of one safetensors file, read with bounds and validated completely.

The format: 8 bytes, the header's length as little-endian unsigned integer; a JSON object of that
length, {name: {"dtype", "shape", "data_offsets": [begin, end]}}, optionally with `__metadata__`
(strings to strings), padded with spaces; then the data, which the tensors tile without gap or
overlap.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron.bridge.dtypes import DTYPE_NAMES, itemsize
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.regular_file import open_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.quoting import is_name, printable, quoted

METADATA_KEY = "__metadata__"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit: no honest header is longer."""

MAX_AXES = 64
MAX_SIZE = (1 << 63) - 1
"""Limits of torch."""


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A dense row-major tensor in a file, `offset` bytes from its start."""

    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header: the tensors in the order of their data; `metadata` None if absent."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None


def read_header(path: Path) -> Header:
    """Read and validate the header of `path`; CheckpointError naming the file and the fault."""
    try:
        return _parse(path)
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{printable(path.name)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"the header is invalid: {error}"


def _parse(path: Path) -> Header:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise CheckpointError(f"is truncated: {size} bytes, too short for a header")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its length is {length} bytes, the limit is {MAX_HEADER_BYTES}")
        if LENGTH_BYTES + length > size:
            raise CheckpointError(
                f"is truncated: the header needs {LENGTH_BYTES + length} bytes, the file has {size}"
            )
        text = os.pread(file.fileno(), length, LENGTH_BYTES)
    entries = parse_object(text)
    metadata = _metadata(entries.pop(METADATA_KEY)) if METADATA_KEY in entries else None
    data_start = LENGTH_BYTES + length
    tensors = [_tensor(name, entry, path, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(tensors, data_start, size)
    return Header(tuple(tensors), metadata)


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:  # the safetensors library reads it as no metadata
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{METADATA_KEY} must map strings to strings")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_AXES and all(map(_is_size, value))


def check_tensor(name: object, dtype: object, shape: object) -> None:
    """Raise CheckpointError if a tensor of this name, dtype and shape cannot be read."""
    if not is_name(name):
        raise CheckpointError(f"{quoted(name)} is no name of a tensor: too long, or not printable")
    if dtype not in DTYPE_NAMES:
        supported = ", ".join(DTYPE_NAMES)
        raise CheckpointError(
            f"{name}: dtype {quoted(dtype)} is not supported; supported: {supported}"
        )
    if not _is_shape(shape):
        raise CheckpointError(f"{name}: shape must be a list of sizes, found {quoted(shape)}")


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{quoted(name)}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check_tensor(name, dtype, shape)
    if not _is_shape(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets must be [begin, end], found {quoted(offsets)}")
    nbytes = prod(shape) * itemsize(dtype)
    begin, end = offsets
    if end - begin != nbytes:
        raise ValueError(
            f"{name}: {dtype} of shape {tuple(shape)} needs {nbytes} bytes, "
            f"data_offsets {offsets} give {end - begin}"
        )
    return TensorInfo(name, tuple(shape), dtype, path, data_start + begin)


def _check_tiling(tensors: list[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            fault = "a gap" if tensor.offset > position else "an overlap"
            raise ValueError(
                f"{fault} before {tensor.name}: its data begin at byte {tensor.offset}, "
                f"the tensor before ends at {position}"
            )
        position += tensor.nbytes
    if size < position:
        last = tensors[-1].name
        raise CheckpointError(
            f"is truncated: {size} bytes, the tensors up to {last} need {position}"
        )
    if size > position:
        raise CheckpointError(f"has {size - position} bytes behind the last tensor")
