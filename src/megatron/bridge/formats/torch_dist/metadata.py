"""Reading `.metadata`, the pickle that indexes a torch_dist checkpoint, without running it.

A pickle can name any callable. This one is read as plain data (see `plain_pickle`), may name
nothing but what an index is made of, and the index is made anew from what it says. So a checkpoint
from a stranger cannot run code, and what is returned has the types that it should.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.iterations import METADATA_FILE
from megatron.bridge.formats.torch_dist.collection import without_collection
from megatron.bridge.formats.torch_dist.metadata_classes import (
    CHUNK,
    CLASSES,
    FILES,
    INDEX,
    METADATA,
    OBJECT,
    PLACE,
    PROPERTIES,
    TENSOR,
)
from megatron.bridge.formats.torch_dist.metadata_runs import MetadataRuns
from megatron.bridge.formats.torch_dist.plain_pickle import (
    Call,
    Entries,
    Name,
    Plain,
    read_plain_pickle,
)
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.tensors.boxes import Box, Shape, format_box
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.quoting import is_name, quoted

MAX_METADATA_BYTES = 256 << 20
"""Enough for a million pieces; the index of 400B parameters and their optimizer has 40 MiB."""

MAX_AXES = 12
"""A tensor of a model has up to 5 axes, and one each for the layer and the expert."""

_MAX_SIZE = (1 << 63) - 1

_NAMES = frozenset(
    (module, name)
    for module, names in {
        "builtins": "set",
        "collections": "OrderedDict",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",
        "torch": " ".join(
            ("Size", "device", "strided", "contiguous_format", "preserve_format", *TORCH_NAMES)
        ),
        "torch.serialization": "_get_layout",
        CLASSES: "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
        FILES: "_StorageInfo",
        "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    }.items()
    for name in names.split()
)
"""What an index of any version names."""


class StoredChunk(NamedTuple):
    """A piece of a tensor as it lies in a file, or an object.

    Attributes:
        key: of the tensor, or the object's name.
        box: of the tensor; () for an object.
        file: its name.
        offset: where in the file it begins.
        length: bytes of what torch.save made of it; 0 where none is stored.
    """

    key: str
    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """The index of a torch_dist checkpoint.

    Attributes:
        tensors: by key.
        objects: names of everything else.
        chunks: of the tensors, those of one after the other.
        stored_objects: where the objects lie.
    """

    tensors: dict[str, TensorSpec]
    objects: list[str]
    chunks: list[StoredChunk]
    stored_objects: list[StoredChunk]


def read_metadata(folder: Path) -> Metadata:
    """The index of a torch_dist checkpoint: its tensors and objects, and where their data lie.

    Every chunk of a tensor has data of its own; whether the chunks fill the tensor, and the files
    hold the data, is not checked here. What else an index may say, and reading does not need, is
    left out.

    Raises:
        CheckpointError: the file is missing, damaged, too long, or holds anything but an index.
    """
    path = folder / METADATA_FILE
    try:
        data = read_regular(path, MAX_METADATA_BYTES)
        with without_collection():
            return _Reading().metadata(
                read_plain_pickle(data, _NAMES, "index", runs=MetadataRuns(data))
            )
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a torch_dist checkpoint: no {METADATA_FILE}"
        ) from None
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{path}: damaged or unsafe, refused to read it: {error}") from error


class _Reading:
    """One index. The same sizes come again and again, and are looked at once."""

    def __init__(self) -> None:
        self._shapes: dict[Call, Shape] = {}
        self._boxes: dict[tuple[Shape, Shape], Box] = {}
        self._places: dict[tuple[str, Shape], tuple[str, int, int]] = {}

    def metadata(self, index: Plain) -> Metadata:
        if not isinstance(index, Call) or index.callee != METADATA:
            raise CheckpointError("it is not the index of a torch_dist checkpoint")
        fields = _state(index, METADATA)
        for where, info in _entries(fields, "storage_data").items():
            self._add_place(_state(where, INDEX), _state(info, PLACE))
        found = Metadata({}, [], [], [])
        for key, entry in _entries(fields, "state_dict_metadata").items():
            name = _checked_name(key)
            if isinstance(entry, Call) and entry.callee == OBJECT:
                found.objects.append(name)
                place = self._places.pop((name, ()), ("", 0, 0))
                found.stored_objects.append(StoredChunk(name, (), *place))
            else:
                state = _state(entry, TENSOR)
                shape = self._shape(name, state.get("size"))
                spec = TensorSpec(name, shape, _dtype(name, state.get("properties")))
                found.tensors[name] = spec
                found.chunks.extend(self._chunks(spec, state.get("chunks")))
        return found

    def _add_place(self, index: Entries, info: Entries) -> None:
        key, offset = _checked_name(index.get("fqn")), index.get("offset")
        where = key, () if offset is None else self._shape(key, offset)
        if where in self._places:
            raise CheckpointError(f"{key}: its data at {where[1]} lie in two places")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{key}: stored compressed or encrypted; save it without")
        file = _checked_name(info.get("relative_path"))
        self._places[where] = file, _size(key, info.get("offset")), _size(key, info.get("length"))

    def _chunks(self, spec: TensorSpec, stated: Plain) -> Iterator[StoredChunk]:
        """The chunks of a tensor; their places are taken out of those that are known."""
        key, axes = spec.name, len(spec.shape)
        if not isinstance(stated, list):
            raise CheckpointError(f"{key}: its chunks should be a list")
        for chunk in stated:
            state = _state(chunk, CHUNK)
            offsets = self._shape(key, state.get("offsets"))
            sizes = self._shape(key, state.get("sizes"))
            if not len(offsets) == len(sizes) == axes:
                raise CheckpointError(f"{key}: a chunk has other axes than shape {spec.shape}")
            box = self._boxes.get((offsets, sizes))
            if box is None:
                box = tuple((at, at + n) for at, n in zip(offsets, sizes, strict=True))
                self._boxes[offsets, sizes] = box
            place = self._places.pop((key, offsets), None)
            if place is None:
                raise CheckpointError(f"{key}: no data stored for {format_box(box)}")
            yield StoredChunk(key, box, *place)

    def _shape(self, key: str, value: Plain) -> Shape:
        """What torch.Size is called with: one tuple."""
        shape = self._shapes.get(value) if isinstance(value, Call) else None
        if shape is not None:
            return shape
        match value:
            case Call(callee=Name("torch", "Size"), arguments=(tuple(sizes),)) if (
                len(sizes) <= MAX_AXES
            ):
                shape = self._shapes[value] = tuple(_size(key, size) for size in sizes)
                return shape
        raise CheckpointError(f"{key}: no shape, or one of more than {MAX_AXES} axes")


# --- plain data of the one type that they should have ---


def _state(value: Plain, of: Name) -> Entries:
    if not isinstance(value, Call) or (value.callee is not of and value.callee != of):
        raise CheckpointError(f"something else where {of.name} should be")
    if not isinstance(value.state, dict):
        raise CheckpointError(f"{of.name} without fields")
    return value.state


def _entries(fields: Entries, field: str) -> Entries:
    entries = fields.get(field)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{field} should be a dict")
    return entries


def _checked_name(value: Plain) -> str:
    if not isinstance(value, str) or not is_name(value):
        raise CheckpointError(f"{quoted(value)} where the name of a tensor or file should be")
    return value


def _size(key: str, value: Plain) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise CheckpointError(f"{key}: {quoted(value)} where a size or an offset should be")
    return value


def _dtype(key: str, value: Plain) -> str:
    """The first of the properties; the others are deprecated."""
    match value:
        case Call(callee=callee, state=(Name("torch", name), *_)) if (
            callee == PROPERTIES and name in TORCH_NAMES
        ):
            return TORCH_NAMES[name]
    raise CheckpointError(f"{key}: its dtype is none that can be read")
