"""Reading boxes of tensors from files, each into new memory.

Reads with `pread` and not through a memory map: tensors of a map share its pages, so a change made
to one would show in the next read, and a file truncated meanwhile would kill the process instead
of raising an error.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.dtypes import itemsize, torch_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, int], ...]
"""One half-open index range (start, stop) per axis."""


class SliceReader:
    """Keeps the files it read from open. Safe to use from several threads; can be pickled."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def __reduce__(self) -> tuple[type[SliceReader], tuple[()]]:
        return SliceReader, ()

    def close(self) -> None:
        """Close all files; a later read opens them again. Not while another thread reads."""
        with self._lock:
            _close_all(self._descriptors)

    def read(self, info: TensorInfo, box: Box | None) -> torch.Tensor:
        """See TensorIndex.read."""
        import torch

        box = tuple((0, size) for size in info.shape) if box is None else tuple(box)
        _check_box(info, box)
        shape = tuple(stop - start for start, stop in box)
        result = torch.empty(shape, dtype=torch_dtype(info.dtype))
        if result.numel() == 0:
            return result
        buffer = memoryview(result.view(-1).view(torch.uint8).numpy())
        descriptor = self._open(info.file)
        position = 0
        for offset, length in _runs(info, box):
            _read_exactly(descriptor, buffer[position : position + length], offset, info)
            position += length
        return result

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
            return self._descriptors[path]


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _check_box(info: TensorInfo, box: Box) -> None:
    fits = len(box) == len(info.shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(box, info.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(f"{info.name}: box {box} does not fit into shape {info.shape}")


def _runs(info: TensorInfo, box: Box) -> Iterator[tuple[int, int]]:
    """(file offset, bytes) of each contiguous piece of a non-empty box, in row-major order."""
    strides = [prod(info.shape[axis + 1 :]) * itemsize(info.dtype) for axis in range(len(box))]
    restricted = [axis for axis, size in enumerate(info.shape) if box[axis] != (0, size)]
    if not restricted:
        yield info.offset, info.nbytes
        return
    # Below the last restricted axis everything is taken, so a piece spans that axis's range.
    last = restricted[-1]
    start, stop = box[last]
    base = info.offset + start * strides[last]
    length = (stop - start) * strides[last]
    for outer in product(*(range(*ranges) for ranges in box[:last])):
        yield base + sum(i * stride for i, stride in zip(outer, strides, strict=False)), length


def _read_exactly(descriptor: int, buffer: memoryview[Any], offset: int, info: TensorInfo) -> None:
    # The kernel returns at most 2 GiB per call.
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise CheckpointError(
                f"{info.file}: it ends at byte {offset}, inside {info.name}: "
                "the file was changed after its header was read"
            )
        buffer = buffer[count:]
        offset += count
