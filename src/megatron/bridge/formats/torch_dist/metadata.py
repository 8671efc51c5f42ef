"""Reading `.metadata`, the pickle that indexes a torch_dist checkpoint, without running it.

A pickle can name any callable. This one is read as plain data (see `plain_pickle`), may name
nothing but what an index is made of, and the index is made anew from what it says. So a checkpoint
from a stranger cannot run code, and what is returned has the types that it should.
"""

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.iterations import METADATA_FILE
from megatron.bridge.formats.torch_dist.collection import without_collection
from megatron.bridge.formats.torch_dist.plain_pickle import (
    Call,
    Entries,
    Name,
    Plain,
    read_plain_pickle,
)
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.tensors.boxes import Shape, format_box
from megatron.bridge.text.quoting import is_name, quoted

MAX_METADATA_BYTES = 256 << 20
"""Enough for a million pieces; the index of 400B parameters and their optimizer has 40 MiB."""

MAX_AXES = 12
"""A tensor of a model has up to 5 axes, and one each for the layer and the expert."""

_MAX_SIZE = (1 << 63) - 1

_CLASSES = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"

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
        _CLASSES: "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
        _FILES: "_StorageInfo",
        "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    }.items()
    for name in names.split()
)
"""What an index of any version names."""

type _Unused = set[tuple[str, Shape]]
"""Key and offsets of the data that no chunk has claimed."""


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
            return _metadata(read_plain_pickle(data, _NAMES, "index"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a torch_dist checkpoint: no {METADATA_FILE}"
        ) from None
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{path}: damaged or unsafe, refused to read it: {error}") from error


def _metadata(index: Plain) -> Metadata:
    if not isinstance(index, Call) or index.callee != Name(_CLASSES, "Metadata"):
        raise CheckpointError("it is not the index of a torch_dist checkpoint")
    fields = _state(index, "Metadata")
    storage = _storage(_entries(fields, "storage_data"))
    unused = {(place.fqn, tuple(place.offset or ())) for place in storage}
    found: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
    for key, entry in _entries(fields, "state_dict_metadata").items():
        name = _checked_name(key)
        if isinstance(entry, Call) and entry.callee == Name(_CLASSES, "BytesStorageMetadata"):
            found[name] = BytesStorageMetadata()
        else:
            found[name] = _tensor(name, _state(entry, "TensorStorageMetadata"), unused)
    return Metadata(found, storage_data=storage)


def _storage(entries: Entries) -> dict[MetadataIndex, _StorageInfo]:
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for place, info in entries.items():
        fields = _state(place, "MetadataIndex")
        key, offset = _checked_name(fields.get("fqn")), fields.get("offset")
        index = MetadataIndex(key, None if offset is None else _shape(key, offset))
        if index in storage:
            raise CheckpointError(f"{key}: its data at {index.offset} lie in two places")
        storage[index] = _storage_info(key, _state(info, "_StorageInfo", _FILES))
    return storage


def _storage_info(key: str, fields: Entries) -> _StorageInfo:
    if fields.get("transform_descriptors"):
        raise CheckpointError(f"{key}: stored compressed or encrypted; save it without")
    return _StorageInfo(
        _checked_name(fields.get("relative_path")),
        _size(key, fields.get("offset")),
        _size(key, fields.get("length")),
    )


def _tensor(key: str, fields: Entries, unused: _Unused) -> TensorStorageMetadata:
    """A tensor; the data of its chunks are taken out of `unused`."""
    dtype = _dtype(key, fields.get("properties"))
    shape = _shape(key, fields.get("size"))
    stated = fields.get("chunks")
    if not isinstance(stated, list):
        raise CheckpointError(f"{key}: its chunks should be a list")
    chunks = []
    for chunk in stated:
        state = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = (_shape(key, state.get(field)) for field in ("offsets", "sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise CheckpointError(f"{key}: a chunk has other axes than shape {tuple(shape)}")
        if (key, offsets) not in unused:
            box = format_box(tuple((at, at + n) for at, n in zip(offsets, sizes, strict=True)))
            raise CheckpointError(f"{key}: no data stored for {box}")
        unused.remove((key, offsets))
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)


# --- plain data of the one type that they should have ---


def _state(value: Plain, name: str, module: str = _CLASSES) -> Entries:
    if not isinstance(value, Call) or value.callee != Name(module, name):
        raise CheckpointError(f"something else where {name} should be")
    if not isinstance(value.state, dict):
        raise CheckpointError(f"{name} without fields")
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


def _dtype(key: str, value: Plain) -> torch.dtype:
    """The first of the properties; the others are deprecated."""
    match value:
        case Call(callee=Name("torch.distributed.checkpoint.metadata", "TensorProperties"),
                  state=(Name("torch", name), *_)) if name in TORCH_NAMES:  # fmt: skip
            dtype: torch.dtype = getattr(torch, name)
            return dtype
    raise CheckpointError(f"{key}: its dtype is none that can be read")


def _shape(key: str, value: Plain) -> torch.Size:
    """What torch.Size is called with: one tuple."""
    match value:
        case Call(callee=Name("torch", "Size"), arguments=(tuple(sizes),)) if (
            len(sizes) <= MAX_AXES
        ):
            return torch.Size([_size(key, size) for size in sizes])
    raise CheckpointError(f"{key}: no shape, or one of more than {MAX_AXES} axes")
