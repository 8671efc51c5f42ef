"""Reading a torch_dist checkpoint by box, without a process group and without megatron-core."""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.iterations import METADATA_FILE, Iteration, iteration_folder
from megatron.bridge.formats.torch_dist.index_format import index_format
from megatron.bridge.formats.torch_dist.metadata import StoredChunk, read_metadata
from megatron.bridge.formats.torch_dist.saved_tensor_reader import find_saved_tensor
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.models.hf_pretrained.slice_reader import SliceReader
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import (
    Box,
    BoxIndex,
    Shape,
    box_shape,
    format_box,
    full_box,
    relative,
    slices,
    tiling_faults,
)
from megatron.bridge.tensors.spec import TensorSpec, check_box

if TYPE_CHECKING:
    import torch


class Place(NamedTuple):
    """Where the data of a chunk lie: those of a tensor with the axes of the chunk in an order."""

    info: TensorInfo
    order: tuple[int, ...]


class TorchDistCheckpoint:
    """Tensors of a torch_dist checkpoint, read by box. Safe to use from several threads.

    Attributes:
        folder: of the iteration.
        tensors: shape and dtype by key.
        objects: names of everything else.
        data_files: those that hold tensors.
        metadata_file: the index.
        format: torch_dist, or another format with the same kind of index, whose tensors can be read
            all the same.
    """

    def __init__(self, folder: Path, iteration: Iteration | None = None) -> None:
        """Read the index of an iteration.

        Args:
            folder: see `iteration_folder`.
            iteration: see `iteration_folder`.

        Raises:
            CheckpointError: as in `iteration_folder`, or the index contradicts itself or the files.
            InputError: as in `iteration_folder`.
        """
        self.folder = iteration_folder(folder, iteration)
        self.metadata_file = self.folder / METADATA_FILE
        metadata = read_metadata(self.folder)
        self.objects = metadata.objects
        self.tensors = metadata.tensors
        self.format = index_format(self.folder, self.tensors)
        chunks = metadata.chunks
        self._refuse(
            [
                *_index_faults(self.tensors, chunks),
                *_file_faults(self.folder, [*chunks, *metadata.stored_objects]),
            ]
        )
        self.data_files = tuple(self.folder / name for name in sorted({c.file for c in chunks}))
        by_key: dict[str, list[tuple[Box, StoredChunk]]] = {key: [] for key in self.tensors}
        for chunk in chunks:
            by_key[chunk.key].append((chunk.box, chunk))
        self._chunks = {key: BoxIndex(items) for key, items in by_key.items()}
        self._places: dict[StoredChunk, Place] = {}
        self._reader = SliceReader()

    def dtype_of(self, key: str) -> str:
        """The dtype ("BF16") of a tensor. Raises CheckpointError for an unknown key."""
        return self._known(key).dtype

    def locate(self, keys: Iterable[str]) -> None:
        """Look up where the data of tensors lie, which `read_into` does when it needs them.

        Called before a conversion, it refuses data that cannot be read before anything is written.

        Raises:
            CheckpointError: some are no plain tensors as the index says; the message lists them
                all.
        """
        problems = []
        for key in keys:
            whole = full_box(self._known(key).shape)
            for _, chunk in self._chunks[key].overlapping(whole):
                try:
                    self._place(chunk)
                except CheckpointError as error:
                    problems.append(str(error))
        self._refuse(problems)

    def read(self, key: str, box: Box) -> "torch.Tensor":
        """One box of a tensor as a torch tensor in new memory; see `read_into`."""
        from megatron.bridge.tensors.torch_views import read_tensor

        check_box(self._known(key), box)
        return read_tensor(self, key, box)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """Read one box of a tensor into `out`, a view of its shape and dtype and of any strides.

        Of each piece that the box overlaps, only what lies in the box is read.

        Raises:
            CheckpointError: the key is unknown, the box lies outside of the tensor, `out` does not
                fit it, or the data are not what the index says.
        """
        spec = self._known(key)
        check_box(spec, box)
        if out.shape != box_shape(box) or out.dtype != numpy_dtype(spec.dtype):
            raise CheckpointError(
                f"{key}: box {box} of {spec.dtype} does not fill {out.shape}, {out.dtype}"
            )
        for shared, chunk in self._chunks[key].overlapping(box):
            part, within = out[slices(relative(shared, box))], relative(shared, chunk.box)
            place, order = self._place(chunk)
            ordered = tuple(within[axis] for axis in order)
            self._reader.read_into(place, ordered, part.transpose(order))

    def places(self, key: str, box: Box) -> Iterator[tuple[Box, Box, Place]]:
        """Where the elements of a box lie.

        Yields:
            A part of the box, the box of the chunk that holds it, and where that lies.

        Raises:
            CheckpointError: the key is unknown, or the data are not what the index says.
        """
        self._known(key)
        for shared, chunk in self._chunks[key].overlapping(box):
            yield shared, chunk.box, self._place(chunk)

    def require_torch_dist(self) -> None:
        """Raise CheckpointError for another format, whose keys are not megatron-core's."""
        if self.format.why is not None:
            raise CheckpointError(
                f"{self.folder}: a checkpoint in the format {self.format.name}, not torch_dist: "
                f"{self.format.why}"
            )

    def close(self) -> None:
        """Close the files; a later read opens them again. Not while another thread reads."""
        self._reader.close()

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise CheckpointError.of_problems(f"{self.folder}: damaged checkpoint", problems)

    def _known(self, key: str) -> TensorSpec:
        spec = self.tensors.get(key)
        if spec is None:
            raise CheckpointError(f"{self.folder}: there is no tensor {key!r}")
        return spec

    def _place(self, chunk: StoredChunk) -> Place:
        """Where the data of a chunk lie; looked up once."""
        place = self._places.get(chunk)
        if place is None:
            # Two threads may look it up at once, and find the same.
            place = self._places[chunk] = self._find(chunk)
        return place

    def _find(self, chunk: StoredChunk) -> Place:
        path = self.folder / chunk.file
        shape, dtype = box_shape(chunk.box), self.tensors[chunk.key].dtype
        try:
            with path.open("rb", buffering=0) as file:

                def read_at(offset: int, length: int) -> bytes:
                    data = os.pread(file.fileno(), length, chunk.offset + offset)
                    if len(data) < length:
                        raise CheckpointError("the file was cut after its index was read")
                    return data

                found = find_saved_tensor(read_at, chunk.length, dtype, shape)
        except (OSError, CheckpointError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{path}: {chunk.key} {format_box(chunk.box)} cannot be read: {reason}"
            ) from error
        if (found.shape, found.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{path}: {chunk.key} should be {dtype} of shape {shape} by the index, the file "
                f"holds {found.dtype} of shape {found.shape}"
            )
        offset = chunk.offset + found.offset
        ordered = tuple(shape[axis] for axis in found.order)
        return Place(TensorInfo(chunk.key, ordered, dtype, path, offset), found.order)


def _index_faults(
    tensors: Mapping[str, TensorSpec], chunks: Iterable[StoredChunk]
) -> Iterator[str]:
    boxes: dict[str, list[Box]] = {key: [] for key in tensors}
    for chunk in chunks:
        boxes[chunk.key].append(chunk.box)

    @cache  # layers are alike
    def faults(shape: Shape, boxes: tuple[Box, ...]) -> tuple[str, ...]:
        return tuple(tiling_faults(shape, boxes))

    for key, spec in tensors.items():
        yield from (f"{key}: {fault}" for fault in faults(spec.shape, tuple(boxes[key])))


def _file_faults(folder: Path, chunks: list[StoredChunk]) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for chunk in chunks:
        if not chunk.length:
            yield f"{chunk.key}: no data stored for {format_box(chunk.box)}"
            continue
        if chunk.file not in sizes:
            sizes[chunk.file] = _size(folder, chunk.file)
        if sizes[chunk.file] == _OUTSIDE:
            yield f"{chunk.key}: its data should lie in the folder, not in {chunk.file!r}"
        elif sizes[chunk.file] == _MISSING:
            yield f"{chunk.key}: {chunk.file} is missing"
        elif chunk.offset + chunk.length > sizes[chunk.file]:
            yield f"{chunk.key}: {chunk.file} ends before its data; the file is truncated"


_OUTSIDE, _MISSING = -1, -2


def _size(folder: Path, name: str) -> int:
    """Bytes of a file, or why it cannot be one of the checkpoint's."""
    if Path(name).name != name:
        return _OUTSIDE
    path = folder / name
    return path.stat().st_size if path.is_file() else _MISSING
