"""What is fuzzed: for any bytes a reader gives a valid result or raises CheckpointError.

Each target takes the bytes that a stranger controls, lets the reader read them, and checks what
comes out against the bytes. Nothing here imports torch but where a target needs it.
"""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from megatron.bridge.dtypes import DTYPE_NAMES, itemsize
from megatron.bridge.errors import CheckpointError, ConfigError
from megatron.bridge.models.hf_pretrained.safetensors_header import read_header
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE
from megatron.bridge.text.quoting import is_name
from model_folders import safetensors_bytes

type Target = Callable[[bytes], None]

LARGEST = 1 << 63
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@cache
def _scratch(name: str) -> Path:
    """A folder of this process, removed at its end."""
    _folders.append(tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-"))
    return Path(_folders[-1].name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def header_file(data: bytes) -> None:
    """A whole safetensors file."""
    path = _scratch("header") / "model.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert "model.safetensors: " in str(error)  # noqa: PT017
        return
    position = 8 + int.from_bytes(data[:8], "little")
    for tensor in header.tensors:
        assert is_name(tensor.name)
        assert tensor.dtype in DTYPE_NAMES
        assert all(type(size) is int and 0 <= size < LARGEST for size in tensor.shape)
        assert tensor.nbytes == prod(tensor.shape) * itemsize(tensor.dtype)
        assert tensor.offset == position
        position += tensor.nbytes
    assert position == len(data)
    assert len({tensor.name for tensor in header.tensors}) == len(header.tensors)
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert text.keys() - {"__metadata__"} == {tensor.name for tensor in header.tensors}
    assert text.get("__metadata__") == header.metadata


def header_text(data: bytes) -> None:
    """The JSON of a header, with as many bytes of data behind it as the last two bytes say."""
    text, size = data[:-2], int.from_bytes(data[-2:], "little")
    header_file(safetensors_bytes(text, bytes(size)))


def weight_index(data: bytes) -> None:
    """The weight index of a folder with two good shards."""
    folder = _example()
    (folder / INDEX_FILE).write_bytes(data)
    try:
        index = TensorIndex.from_folder(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)  # noqa: PT017
        return
    # The index says which files are read, the files say what is in them.
    named = {folder / name for name in json.loads(data)["weight_map"].values()}
    assert {info.file for info in index.values()} == named <= {folder / n for n in _SHARDS}


def _write_shards(folder: Path) -> None:
    """Two small shards, with a scalar, an empty tensor and metadata."""
    for number, name in enumerate(_SHARDS):
        entries = {
            f"{number}.weight": ("BF16", [5, 3 + number]),
            f"{number}.scale": ("F32", []),
            f"{number}.empty": ("I64", [0, 4]),
        }
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for key, (dtype, shape) in entries.items():
            end = position + prod(shape) * itemsize(dtype)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        (folder / name).write_bytes(safetensors_bytes(header, bytes(position)))


@cache
def _example() -> Path:
    _write_shards(_scratch("index"))
    return _scratch("index")


def checkpoint_metadata(data: bytes) -> None:
    """The `.metadata` of a torch_dist checkpoint whose data are not there."""
    from megatron.bridge.formats.torch_dist.metadata import read_metadata
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

    folder = _scratch("metadata")
    (folder / ".metadata").write_bytes(data)
    try:
        metadata = read_metadata(folder)
    except CheckpointError as error:
        assert "refused to read it" in str(error)  # noqa: PT017
        return
    for key, spec in metadata.tensors.items():
        assert is_name(key)
        assert key == spec.name
        assert spec.dtype in DTYPE_NAMES
        assert all(type(size) is int and 0 <= size < LARGEST for size in spec.shape)
    assert all(map(is_name, metadata.objects))
    assert [chunk.key for chunk in metadata.stored_objects] == metadata.objects
    for chunk in metadata.chunks:
        assert len(chunk.box) == len(metadata.tensors[chunk.key].shape)
        assert all(type(end) is int for ends in chunk.box for end in ends)
        assert all(0 <= start <= stop for start, stop in chunk.box)
    for chunk in (*metadata.chunks, *metadata.stored_objects):
        assert is_name(chunk.file) or (not chunk.file and not chunk.length)
        assert all(type(n) is int and 0 <= n < LARGEST for n in (chunk.offset, chunk.length))
    try:
        checkpoint = TorchDistCheckpoint(folder)
    except CheckpointError:
        return
    assert not checkpoint.tensors  # there is no file that could hold any


def saved_tensor(data: bytes) -> None:
    """A tensor as torch.save wrote it, or not."""
    from megatron.bridge.formats.torch_dist.saved_tensor_reader import find_saved_tensor

    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return data[offset : offset + length]

    try:
        found = find_saved_tensor(read_at, len(data), "BF16", (5, 3))
    except CheckpointError:
        return
    assert all(type(size) is int and 0 <= size < LARGEST for size in found.shape)
    assert sorted(found.order) == list(range(len(found.shape)))
    end = found.offset + prod(found.shape) * itemsize(found.dtype)
    assert 0 <= found.offset <= end <= len(data)


def saved_pickle(data: bytes) -> None:
    """The pickle inside of what torch.save wrote, in an archive that is in order."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(30))
        archive.writestr("archive/version", "3\n")
    saved_tensor(buffer.getvalue())


def config_record(data: bytes) -> None:
    """The run_config.yaml of a checkpoint."""
    from megatron.bridge.formats.config_record import CONFIG_RECORD, read_hf_config

    folder = _scratch("record")
    (folder / CONFIG_RECORD).write_bytes(data)
    try:
        config = read_hf_config(folder)
    except (CheckpointError, ConfigError) as error:
        assert CONFIG_RECORD in str(error)  # noqa: PT017
        return
    json.dumps(config.data, allow_nan=False)


def _header_seeds() -> list[bytes]:
    folder = _example()
    return [(folder / name).read_bytes() for name in _SHARDS]


def _text_seeds() -> list[bytes]:
    seeds = []
    for content in _header_seeds():
        end = 8 + int.from_bytes(content[:8], "little")
        seeds.append(content[8:end] + (len(content) - end).to_bytes(2, "little"))
    return seeds


def _index_seeds() -> list[bytes]:
    headers = [read_header(_example() / name) for name in _SHARDS]
    tensors = [tensor for header in headers for tensor in header.tensors]
    return [
        json.dumps(
            {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {tensor.name: tensor.file.name for tensor in tensors},
            }
        ).encode()
    ]


def example_metadata() -> Any:
    """An index of two tensors, one in two chunks, and an object."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    def tensor(shape: tuple[int, ...], *starts: int) -> TensorStorageMetadata:
        stops = (*starts[1:], shape[0])
        chunks = [
            ChunkStorageMetadata(
                torch.Size((start, *[0] * (len(shape) - 1))),
                torch.Size((stop - start, *shape[1:])),
            )
            for start, stop in zip(starts, stops, strict=True)
        ]
        properties = TensorProperties(dtype=torch.bfloat16)
        return TensorStorageMetadata(properties, torch.Size(shape), chunks)

    entries = {"a.weight": tensor((5, 3), 0, 2), "b.bias": tensor((7,), 0)}
    places = [MetadataIndex(k, c.offsets) for k, entry in entries.items() for c in entry.chunks]
    places.append(MetadataIndex("c.extra"))
    return Metadata(
        {**entries, "c.extra": BytesStorageMetadata()},
        planner_data={"a.weight": ("a", "weight")},
        storage_data={
            place: _StorageInfo("__0_0.distcp", 1000 * n, 1000) for n, place in enumerate(places)
        },
        storage_meta=StorageMeta(checkpoint_id=Path("/somewhere"), save_id="1"),
    )


def _metadata_seeds() -> list[bytes]:
    return [pickle.dumps(example_metadata(), protocol) for protocol in (2, 4)]


def _saved_seeds() -> list[bytes]:
    import torch

    seeds = []
    for tensor in (
        torch.ones(5, 3, dtype=torch.bfloat16),
        torch.ones(3, 5, dtype=torch.bfloat16).t(),
        torch.ones(5, 6).to(torch.float8_e4m3fn),
    ):
        torch.save(tensor, buffer := io.BytesIO())
        seeds.append(buffer.getvalue())
    return seeds


def _pickle_seeds() -> list[bytes]:
    archives = [zipfile.ZipFile(io.BytesIO(seed)) for seed in _saved_seeds()]
    return [archive.read("archive/data.pkl") for archive in archives]


def _record_seeds() -> list[bytes]:
    from megatron.bridge.formats.config_record import config_record as record
    from megatron.bridge.models.hf_pretrained.config import HFConfig

    config = HFConfig.from_dict({"model_type": "x", "text_config": {"sizes": [1, 2.5, None]}})
    return [record("some.Provider", {"layers": 3, "kinds": ["a", "b"]}, config)]


TARGETS: dict[str, tuple[Target, Callable[[], list[bytes]]]] = {
    "header-file": (header_file, _header_seeds),
    "header-text": (header_text, _text_seeds),
    "index": (weight_index, _index_seeds),
    "metadata": (checkpoint_metadata, _metadata_seeds),
    "saved-tensor": (saved_tensor, _saved_seeds),
    "saved-pickle": (saved_pickle, _pickle_seeds),
    "record": (config_record, _record_seeds),
}
"""By name: the target, and what makes honest inputs to begin from."""
