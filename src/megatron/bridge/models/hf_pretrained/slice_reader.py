"""Reading boxes of tensors from files, into memory of the caller's or into new memory.

Reads with `pread` and not through a memory map: tensors of a map share its pages, so a change made
to one would show in the next read, and a file truncated meanwhile would kill the process instead
of raising an error.

Whoever reads a file that is not in the page cache fills the cache with it. New pages are dear: that
may take longer than the disk does, and other programs lose theirs. A thread that reads every byte
once (`read_once`) gives back each range of such a file as soon as it has it, and the kernel takes
the same pages again. Reading with O_DIRECT was slower, since nothing is read ahead then.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from megatron.bridge.dtypes import itemsize, numpy_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.file_hints import cached_bytes, forget
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.tensors.arrays import Array, copy, empty, memory_of
from megatron.bridge.tensors.boxes import Box, box_shape
from megatron.bridge.tensors.runs import Runs
from megatron.bridge.tensors.spec import check_box

SCRATCH_BYTES = 4 << 20
"""Memory of each thread for elements that cannot be read straight to their place."""

_MOST_OPEN = 64
"""How many files are kept open: a checkpoint may have more than a process may open."""

_LONG_RUN = 32 << 10
"""Bytes of a run, above which reading one run after the other costs less than all between them."""


_local = threading.local()


def read_once() -> None:
    """Let the thread that calls this leave files out of the page cache that were not there."""
    _local.once = True


class SliceReader:
    """Keeps the files open that it read last. Safe to use from several threads; can be pickled."""

    def __init__(self) -> None:
        self._files: dict[Path, _OpenFile] = {}  # the latest one last
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[SliceReader], tuple[()]]:
        return SliceReader, ()

    def close(self) -> None:
        """Close all files; one that a thread is reading is closed after that.

        A later read opens them again.
        """
        with self._lock:
            self._files.clear()

    def read_into(self, info: TensorInfo, box: Box, out: Array) -> None:
        """Read one box into `out`, a view of any strides, in the dtype of the file.

        Memory beside `out` is at most SCRATCH_BYTES for each thread that reads.

        Raises:
            CheckpointError: as TensorIndex.read, and if the shape or dtype of `out` is not that of
                the box.
        """
        check_box(info, box)
        if out.shape != box_shape(box):
            raise CheckpointError(f"{info.name}: box {box} does not fill shape {out.shape}")
        if out.dtype != numpy_dtype(info.dtype):
            raise CheckpointError(f"{info.name}: it is {info.dtype}, not {out.dtype}")
        if out.size == 0:
            return
        file = self._open(info.file)
        runs, width = Runs(info.shape, box), itemsize(info.dtype)
        if out.flags.c_contiguous and (runs.length * width >= _LONG_RUN or runs.count == 1):
            rest = memory_of(out)
            for start in runs.starts():
                run, rest = rest[: runs.length * width], rest[runs.length * width :]
                _read_exactly(file, run, info.offset + start * width, info, once=True)
        else:
            _read_bands(file, info, box, out, 0, info.offset)

    def _open(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                file = _OpenFile(path)
            self._files[path] = file
            if len(self._files) > _MOST_OPEN:
                del self._files[next(iter(self._files))]
            return file


class _OpenFile:
    """A descriptor that is closed once nothing refers to this any more.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        weakref.finalize(self, os.close, self.descriptor)

    @cached_property
    def cold(self) -> bool:
        """Whether most of the file was not in the page cache when this was asked first."""
        cached = cached_bytes(self.descriptor)
        return cached is not None and cached < os.fstat(self.descriptor).st_size // 2


def _read_bands(
    file: _OpenFile, info: TensorInfo, box: Box, out: Array, axis: int, offset: int
) -> None:
    """Read bands of whole rows through scratch memory; of each, copy what the box takes to `out`.

    The row-major block that spans `axis` and all axes behind it begins at `offset` in the file.
    """
    rest = info.shape[axis + 1 :]
    stride = prod(rest) * itemsize(info.dtype)
    start, stop = box[axis]
    if stride > SCRATCH_BYTES and rest:
        for index in range(start, stop):
            begin = offset + index * stride
            _read_bands(file, info, box, out[index - start], axis + 1, begin)
        return
    scratch = _scratch()
    inner = tuple(slice(*bounds) for bounds in box[axis + 1 :])
    rows = max(1, SCRATCH_BYTES // stride)
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        band = scratch[: (last - first) * stride]
        # Of a part of its rows, the rest is wanted for another box.
        once = inner == tuple(slice(0, size) for size in rest)
        _read_exactly(file, memory_of(band), offset + first * stride, info, once=once)
        whole = band.view(out.dtype).reshape(last - first, *rest)
        copy(whole[:, *inner], out[first - start : last - start])


def _scratch() -> Array:
    if not hasattr(_local, "scratch"):
        _local.scratch = empty((SCRATCH_BYTES,), "U8")
    scratch: Array = _local.scratch
    return scratch


def _read_exactly(
    file: _OpenFile, buffer: memoryview[Any], offset: int, info: TensorInfo, *, once: bool
) -> None:
    forgotten = once and getattr(_local, "once", False) and file.cold
    # The kernel returns at most 2 GiB per call.
    while buffer:
        try:
            count = os.preadv(file.descriptor, [buffer], offset)
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: {info.name} cannot be read: {error.strerror}"
            ) from error
        if count == 0:
            raise CheckpointError(
                f"{info.file}: it ends at byte {offset}, inside {info.name}: "
                "the file was changed after its header was read; run it again when nothing "
                "writes to it"
            )
        if forgotten:
            forget(file.descriptor, offset, count)
        buffer = buffer[count:]
        offset += count
