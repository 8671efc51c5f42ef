"""Finding the data of a tensor that torch.save wrote, without running anything of its pickle.

A tensor as `SavedTensor` lays it out is recognised by its bytes; any other is read as the zip file
that it is. Its pickle is read as plain data; the calls in it are taken for what they say of the
tensor, and none is made.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from struct import Struct
from typing import NamedTuple

from megatron.bridge.dtypes import TORCH_NAMES, itemsize
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.torch_dist.plain_pickle import (
    Call,
    Name,
    Plain,
    Reference,
    read_plain_pickle,
)
from megatron.bridge.formats.torch_dist.saved_tensor import MAX_BLOB_BYTES, STORAGES, frame_of
from megatron.bridge.tensors.boxes import Shape
from megatron.bridge.text.quoting import quoted

type ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, length)``: so many bytes of the saved tensor. Raises CheckpointError."""

_MAX_READ = 1 << 20
"""No directory of an honest saved tensor is as long."""

_MAX_PICKLE = 1 << 14
_LOCAL = Struct("<4s22x2H")
_LOCAL_MARK = b"PK\3\4"
_ENCRYPTED = 1

_STORED = {storage: dtype for dtype, storage in STORAGES.items()} | {"UntypedStorage": None}
"""The dtype of a storage's elements by its class; None if it holds bytes."""

_NAMES = frozenset(
    {("torch", name) for name in (*STORAGES.values(), *TORCH_NAMES)}
    | {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")}
    | {("torch.storage", "UntypedStorage"), ("collections", "OrderedDict")}
)


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A dense tensor.

    Attributes:
        offset: where its data begin, in bytes from the beginning of the saved tensor.
        order: its axes as the data are ordered; in row-major order, from the first to the last.
    """

    offset: int
    shape: Shape
    dtype: str
    order: tuple[int, ...]


def find_saved_tensor(read_at: ReadAt, length: int, dtype: str, shape: Shape) -> FoundTensor:
    """Find the data of a tensor in what torch.save made of it.

    Args:
        read_at: reads from the saved tensor.
        length: of the saved tensor, in bytes.
        dtype: the expected one; the caller compares it with what is found.
        shape: the expected one, likewise.

    Raises:
        CheckpointError: it is anything but a plain, dense, little-endian, uncompressed tensor.
    """
    if (found := _ours(read_at, length, dtype, shape)) is not None:
        return found
    try:
        return _find(_Blob(read_at, length))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"it is no saved tensor: {error}") from error


def _ours(read_at: ReadAt, length: int, dtype: str, shape: Shape) -> FoundTensor | None:
    """A tensor, if all bytes around its data are those that this package writes."""
    if not prod(shape) * itemsize(dtype) < length <= MAX_BLOB_BYTES:
        return None
    axes = tuple(range(len(shape)))
    for transposed in (False, True) if len(shape) > 1 else (False,):
        frame = frame_of(dtype, shape, transposed)
        begin = len(frame.head)
        end = begin + frame.tensor_bytes
        if (
            frame.nbytes == length
            and read_at(0, begin) == frame.head
            and frame.is_tail(read_at(end, length - end))
        ):
            order = (*axes[:-2], axes[-1], axes[-2]) if transposed else axes
            return FoundTensor(begin, shape, dtype, order)
    return None


class _Blob(io.RawIOBase):
    """A saved tensor as a file of its own, for zipfile; refuses reads that need much memory."""

    def __init__(self, read_at: ReadAt, length: int) -> None:
        self.length = length
        self._read_at = read_at
        self._position = 0

    def at(self, offset: int, count: int) -> bytes:
        if not 0 <= offset <= offset + count <= self.length:
            raise CheckpointError("it is no saved tensor: a record lies outside of it")
        if count > _MAX_READ:
            raise CheckpointError(f"it is no saved tensor: a directory of {count} bytes")
        return self._read_at(offset, count)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}
        self._position = start[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.length - self._position)
        data = self.at(self._position, rest if size is None or size < 0 else min(size, rest))
        self._position += len(data)
        return data


def _find(blob: _Blob) -> FoundTensor:
    with zipfile.ZipFile(blob) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise CheckpointError("it is no saved tensor: two records have one name")
        root = next(iter(entries), "").partition("/")[0]

        def small(name: str) -> bytes:
            entry = _stored(entries, f"{root}/{name}")
            if entry.file_size > _MAX_PICKLE:
                raise CheckpointError(f"its {name} of {entry.file_size} bytes is no tensor's")
            return archive.read(entry)

        # Older files do not name the order.
        if f"{root}/byteorder" in entries and (order := small("byteorder")) != b"little":
            raise CheckpointError(f"its byte order is {order!r}, not b'little'")
        tensor = _described(small("data.pkl"))
    entry = _stored(entries, f"{root}/data/{tensor.key}")
    if entry.file_size != tensor.nbytes:
        raise CheckpointError(
            f"its data should be {tensor.nbytes} bytes, the record has {entry.file_size}"
        )
    begin = _begin_of(blob, entry) + tensor.offset * itemsize(tensor.dtype)
    return FoundTensor(begin, tensor.shape, tensor.dtype, tensor.order)


def _stored(entries: dict[str, zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(f"it is no saved tensor: it has no record {name}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"its {name} is compressed or encrypted; save it without")
    if entry.compress_size != entry.file_size:
        raise CheckpointError(f"its {name} has two different sizes")
    return entry


def _begin_of(blob: _Blob, entry: zipfile.ZipInfo) -> int:
    """Where the content of a record begins: behind the local header, which has its own length."""
    name = entry.orig_filename.encode()
    header = blob.at(entry.header_offset, _LOCAL.size + len(name))
    mark, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    if mark != _LOCAL_MARK or name_bytes != len(name) or header[_LOCAL.size :] != name:
        raise CheckpointError(f"its {entry.filename} does not lie where the directory says")
    begin: int = entry.header_offset + len(header) + extra_bytes
    if begin + entry.file_size > blob.length:
        raise CheckpointError(f"its {entry.filename} sticks out of it")
    return begin


class _Tensor(NamedTuple):
    """What the pickle says of a tensor.

    Attributes:
        key: its elements lie in the record data/`key`.
        nbytes: length of that record.
        offset: where they begin in it, in elements.
        order: see FoundTensor.
    """

    key: str
    nbytes: int
    offset: int
    shape: Shape
    dtype: str
    order: tuple[int, ...]


@lru_cache(maxsize=1024)
def _described(data: bytes) -> _Tensor:
    """The tensor of a `data.pkl`. Raises CheckpointError for anything else."""
    match read_plain_pickle(data, _NAMES, "tensor", references=True):
        case Call(
            callee=Name("torch._utils", function),
            arguments=(Reference(storage), offset, tuple(shape), tuple(strides), _, _, *stated),
        ):
            pass
        case _:
            raise CheckpointError("it is no tensor but another object")
    match storage:
        case ("storage", Name(_, kind), str(key), str(), int(length)) if kind in _STORED:
            nbytes = length * itemsize(_STORED[kind] or "U8")
        case _:
            raise CheckpointError("its pickle refers to something else than a storage")
    match function, stated:
        case "_rebuild_tensor_v2", []:
            dtype = _STORED[kind]
        case "_rebuild_tensor_v3", [Name("torch", name)]:
            dtype = TORCH_NAMES.get(name)
        case _:
            dtype = None
    if dtype is None:
        raise CheckpointError("its pickle calls torch with wrong arguments")
    begin, *sizes = map(_whole_number, (offset, *shape))
    order = _order(sizes, tuple(map(_whole_number, strides)))
    if order is None:
        raise CheckpointError(
            f"shape {quoted(shape)} with strides {quoted(strides)}: only tensors are read whose "
            "elements lie one after the other; save it as a contiguous one"
        )
    if (begin + prod(sizes)) * itemsize(dtype) > nbytes:
        raise CheckpointError(f"shape {quoted(shape)} does not fit into {nbytes} bytes of data")
    return _Tensor(key, nbytes, begin, tuple(sizes), dtype, order)


def _whole_number(value: Plain) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"its pickle has {quoted(value)} where a size should be")
    return value


def _order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The order of axes in which the elements lie one after the other; None if in none.

    The stride of an axis of length 1 is free. No element lies in two places: strides that say so
    belong to no order.
    """
    if len(strides) != len(shape):
        return None
    axes = range(len(shape))
    by_stride = sorted(axes, key=lambda axis: (-strides[axis], axis))
    long = [axis for axis in by_stride if shape[axis] != 1]
    for order in (axes, [*(axis for axis in axes if shape[axis] == 1), *long]):
        if _is_row_major([shape[axis] for axis in order], [strides[axis] for axis in order]):
            return tuple(order)
    return None


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= max(1, size)
    return True
