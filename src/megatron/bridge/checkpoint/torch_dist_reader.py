"""Reading a torch_dist checkpoint by box, without a process group and without megatron-core."""

import io
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron.bridge.checkpoint.iterations import iteration_folder
from megatron.bridge.checkpoint.torch_dist_metadata import read_metadata
from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.conversion.boxes import (
    Box,
    BoxIndex,
    box_shape,
    format_box,
    relative,
    slices,
    tiling_faults,
)
from megatron.bridge.models.conversion.plan import TensorSpec

_CACHE_BYTES = 256 << 20
_SHOWN_PROBLEMS = 50


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A piece of a tensor as it lies in a file: its box and the bytes of a saved tensor."""

    key: str
    box: Box
    file: str
    offset: int
    length: int


class TorchDistCheckpoint:
    """Tensors of a torch_dist checkpoint, read by box.

    tensors: shape and dtype by key. objects: names of everything else.
    Raises CheckpointError where the index contradicts itself or the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = iteration_folder(folder)
        metadata = read_metadata(self.folder)
        entries = metadata.state_dict_metadata
        self.objects = [key for key, e in entries.items() if isinstance(e, BytesStorageMetadata)]
        self.tensors = {
            key: TensorSpec(key, tuple(entry.size), safetensors_dtype(entry.properties.dtype))
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        chunks = _stored_chunks(metadata)
        if problems := [*_index_faults(self.tensors, chunks), *_file_faults(self.folder, chunks)]:
            shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
            raise CheckpointError(f"{self.folder}: damaged checkpoint\n{shown}")
        by_key: dict[str, list[tuple[Box, _Chunk]]] = {key: [] for key in self.tensors}
        for chunk in chunks:
            by_key[chunk.key].append((chunk.box, chunk))
        self._chunks = {key: BoxIndex(items) for key, items in by_key.items()}
        self._cache: OrderedDict[_Chunk, torch.Tensor] = OrderedDict()

    def read(self, key: str, box: Box) -> torch.Tensor:
        """One box of a tensor, of shape ``box_shape(box)``. Raises CheckpointError."""
        result = torch.empty(box_shape(box), dtype=torch_dtype(self.tensors[key].dtype))
        for shared, chunk in self._chunks[key].overlapping(box):
            part = self._load(chunk)[slices(relative(shared, chunk.box))]
            result[slices(relative(shared, box))] = part
        return result

    def _load(self, chunk: _Chunk) -> torch.Tensor:
        """A whole chunk. The last few are kept: q, k and v, or gate and up, share one."""
        if chunk in self._cache:
            self._cache.move_to_end(chunk)
            return self._cache[chunk]
        expected = (box_shape(chunk.box), self.tensors[chunk.key].dtype)
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.offset)
                data = io.BytesIO(file.read(chunk.length))
            tensor = torch.load(data, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file can raise anything
            raise CheckpointError(f"{path}: {chunk.key} cannot be read: {error}") from error
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: {chunk.key} is no tensor but {type(tensor).__name__}")
        found = (tuple(tensor.shape), safetensors_dtype(tensor.dtype))
        if found != expected:
            raise CheckpointError(
                f"{path}: {chunk.key} should be {expected} by the index, the file holds {found}"
            )
        self._cache[chunk] = tensor
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return tensor


def _stored_chunks(metadata: Metadata) -> list[_Chunk]:
    """Every tensor piece that lies in a file; `length` is 0 for one that lies in none."""
    storage = {
        (index.fqn, tuple(index.offset or ())): info
        for index, info in metadata.storage_data.items()
    }
    found = []
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            offsets = tuple(chunk.offsets)
            box = tuple((at, at + n) for at, n in zip(offsets, chunk.sizes, strict=True))
            info = storage.get((key, offsets))
            if info is None:
                found.append(_Chunk(key, box, "", 0, 0))
            elif info.transform_descriptors:
                raise CheckpointError(f"{key}: stored compressed or encrypted; save it without")
            else:
                found.append(_Chunk(key, box, info.relative_path, info.offset, info.length))
    return found


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
        elif Path(chunk.file).name != chunk.file:
            yield f"{chunk.key}: its data should lie in the folder, not in {chunk.file!r}"
        else:
            if chunk.file not in sizes:
                path = folder / chunk.file
                sizes[chunk.file] = path.stat().st_size if path.is_file() else -1
            if sizes[chunk.file] < 0:
                yield f"{chunk.key}: {chunk.file} is missing"
            elif chunk.offset < 0 or chunk.offset + chunk.length > sizes[chunk.file]:
                yield f"{chunk.key}: {chunk.file} ends before its data; the file is truncated"
