"""Reading a torch_dist checkpoint by box, without a process group and without megatron-core."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.iterations import METADATA_FILE, Iteration, iteration_folder
from megatron.bridge.formats.torch_dist.index_format import index_format
from megatron.bridge.formats.torch_dist.metadata import read_metadata
from megatron.bridge.formats.torch_dist.saved_tensor_reader import find_saved_tensor
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.models.hf_pretrained.slice_reader import SliceReader
from megatron.bridge.tensors.boxes import (
    Box,
    BoxIndex,
    box_shape,
    format_box,
    full_box,
    relative,
    slices,
    tiling_faults,
)
from megatron.bridge.tensors.spec import TensorSpec, check_box


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A piece of a tensor as it lies in a file: its box and the bytes of a saved tensor.

    An object is a piece, too; its box is ().
    """

    key: str
    box: Box
    file: str
    offset: int
    length: int


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
        entries = metadata.state_dict_metadata
        self.objects = [key for key, e in entries.items() if isinstance(e, BytesStorageMetadata)]
        self.tensors = {
            key: TensorSpec(key, tuple(entry.size), safetensors_dtype(entry.properties.dtype))
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.format = index_format(self.folder, self.tensors)
        stored = list(_stored_chunks(metadata))
        chunks = [chunk for chunk in stored if chunk.key in self.tensors]
        self._refuse([*_index_faults(self.tensors, chunks), *_file_faults(self.folder, stored)])
        self.data_files = tuple(self.folder / name for name in sorted({c.file for c in chunks}))
        by_key: dict[str, list[tuple[Box, _Chunk]]] = {key: [] for key in self.tensors}
        for chunk in chunks:
            by_key[chunk.key].append((chunk.box, chunk))
        self._chunks = {key: BoxIndex(items) for key, items in by_key.items()}
        self._places: dict[_Chunk, TensorInfo] = {}
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

    def read(self, key: str, box: Box) -> torch.Tensor:
        """One box of a tensor, in new memory, of shape ``box_shape(box)``; see `read_into`."""
        result = torch.empty(box_shape(box), dtype=torch_dtype(self.dtype_of(key)), device="cpu")
        self.read_into(key, box, result)
        return result

    def read_into(self, key: str, box: Box, out: torch.Tensor) -> None:
        """Read one box of a tensor into `out`, a view of its shape and dtype and of any strides.

        Of each piece that the box overlaps, only what lies in the box is read.

        Raises:
            CheckpointError: the key is unknown, the box lies outside of the tensor, `out` does not
                fit it, or the data are not what the index says.
        """
        spec = self._known(key)
        check_box(spec, box)
        if tuple(out.shape) != box_shape(box) or out.dtype != torch_dtype(spec.dtype):
            raise CheckpointError(
                f"{key}: box {box} of {spec.dtype} does not fill {tuple(out.shape)}, {out.dtype}"
            )
        for shared, chunk in self._chunks[key].overlapping(box):
            part = out[slices(relative(shared, box))]
            self._reader.read_into(self._place(chunk), relative(shared, chunk.box), part)

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

    def _place(self, chunk: _Chunk) -> TensorInfo:
        """Where the data of a chunk lie; looked up once."""
        place = self._places.get(chunk)
        if place is None:
            # Two threads may look it up at once, and find the same.
            place = self._places[chunk] = self._find(chunk)
        return place

    def _find(self, chunk: _Chunk) -> TensorInfo:
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
        return TensorInfo(chunk.key, shape, dtype, path, offset)


def _stored_chunks(metadata: Metadata) -> Iterator[_Chunk]:
    """Every piece of a tensor, and every object; `length` is 0 where none is stored."""
    storage = {
        (index.fqn, tuple(index.offset or ())): info
        for index, info in metadata.storage_data.items()
    }
    for key, entry in metadata.state_dict_metadata.items():
        for box in _boxes(entry):
            info = storage.get((key, tuple(start for start, _ in box)))
            if info is None:
                yield _Chunk(key, box, "", 0, 0)
            else:
                yield _Chunk(key, box, str(info.relative_path), info.offset, info.length)


def _boxes(entry: object) -> Iterator[Box]:
    if not isinstance(entry, TensorStorageMetadata):
        yield ()
        return
    for chunk in entry.chunks:
        yield tuple((at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))


def _index_faults(tensors: dict[str, TensorSpec], chunks: list[_Chunk]) -> Iterator[str]:
    boxes: dict[str, list[Box]] = {key: [] for key in tensors}
    for chunk in chunks:
        boxes[chunk.key].append(chunk.box)
    for key, spec in tensors.items():
        yield from (f"{key}: {fault}" for fault in tiling_faults(spec.shape, boxes[key]))


def _file_faults(folder: Path, chunks: list[_Chunk]) -> Iterator[str]:
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
