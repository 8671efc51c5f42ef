"""The index that is written: PyTorch unpickles the objects that it would make itself."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import Metadata as TorchMetadata

from megatron.bridge.dtypes import DTYPE_NAMES, torch_dtype
from megatron.bridge.formats.torch_dist.metadata import Metadata, StoredChunk, read_metadata
from megatron.bridge.formats.torch_dist.metadata_writer import metadata_bytes
from megatron.bridge.formats.torch_dist.pickle_codes import integer, integers
from megatron.bridge.tensors.boxes import Box, box_shape, full_box
from megatron.bridge.tensors.spec import TensorSpec

type Stored = Sequence[StoredChunk]


def made_by_torch(
    tensors: Mapping[str, TensorSpec], objects: Iterable[str], stored: Stored
) -> TorchMetadata:
    """The same index of PyTorch's own objects."""

    def corner(box: Box) -> torch.Size:
        return torch.Size(start for start, _ in box)

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, spec in tensors.items():
        tensor = torch.empty(0, dtype=torch_dtype(spec.dtype))
        chunks = [
            ChunkStorageMetadata(corner(chunk.box), torch.Size(box_shape(chunk.box)))
            for chunk in stored
            if chunk.key == key
        ]
        properties = TensorProperties.create_from_tensor(tensor)
        entries[key] = TensorStorageMetadata(properties, torch.Size(spec.shape), chunks)
    return TorchMetadata(
        {**entries, **{key: BytesStorageMetadata() for key in objects}},
        storage_data={
            MetadataIndex(
                chunk.key, corner(chunk.box) if chunk.key in tensors else None
            ): _StorageInfo(chunk.file, chunk.offset, chunk.length)
            for chunk in stored
        },
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )


def assert_alike(found: Any, expected: Any, where: str = "index") -> None:
    """Equal, of the same types, in the same order, all the way down."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert len(found) == len(expected), where
        for one, other in zip(found.items(), expected.items(), strict=True):
            assert_alike(one[0], other[0], f"{where}, key")
            assert_alike(one[1], other[1], f"{where}[{other[0]!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{where}[{number}]")
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):
            name = f"{where}.{field.name}"
            assert_alike(getattr(found, field.name), getattr(expected, field.name), name)
    else:
        assert found == expected, where


def check(
    folder: Path, tensors: Mapping[str, TensorSpec], objects: Sequence[str], stored: Stored
) -> bytes:
    """Both read it: PyTorch, and `read_metadata`."""
    data = metadata_bytes(tensors, objects, stored)
    expected = made_by_torch(tensors, objects, stored)
    found = pickle.loads(data)
    assert_alike(found, expected)
    assert found == expected
    (folder / ".metadata").write_bytes(data)
    places = {(chunk.key, chunk.box): chunk for chunk in stored}
    assert read_metadata(folder) == Metadata(
        dict(tensors),
        list(objects),
        [chunk for key in tensors for chunk in stored if chunk.key == key],
        [places[key, ()] for key in objects],
    )
    return data


def specs(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {key: TensorSpec(key, shape, dtype) for key, (dtype, shape) in shapes.items()}


def whole(tensors: Mapping[str, TensorSpec], objects: Sequence[str] = ()) -> list[StoredChunk]:
    boxes = [(key, full_box(spec.shape)) for key, spec in tensors.items()]
    return [
        StoredChunk(key, box, f"__0_{n // 3}.distcp", 1000 * n, 900 + n)
        for n, (key, box) in enumerate([*boxes, *((key, ()) for key in objects)])
    ]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    tensors = specs(a=(dtype, (3, 5)), b=(dtype, ()))
    check(tmp_path, tensors, ["c/shard_0_1"], whole(tensors, ["c/shard_0_1"]))


def test_tensors_of_several_chunks_scalars_and_objects(tmp_path: Path) -> None:
    tensors = specs(
        fused=("BF16", (4, 6, 3)),
        scalar=("F32", ()),
        many_axes=("I64", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
        empty=("U8", (0, 4)),
        vector=("F64", (7,)),
    )
    objects = ["state/shard_0_1", "common_state/shard_0_1"]
    first, *others = whole(tensors, objects)
    # Those of a tensor lie here and there among those of others.
    parts = [((a, a + 2), (b, b + 3), (0, 3)) for a in (0, 2) for b in (0, 3)]
    cut = [StoredChunk("fused", box, "__0_9.distcp", n, 7) for n, box in enumerate(parts)]
    check(tmp_path, tensors, objects, [cut[2], *others[:2], cut[0], cut[1], *others[2:], cut[3]])
    check(tmp_path, tensors, [], [first, *others[:-2]])
    check(tmp_path, {}, objects, others[-2:])
    check(tmp_path, {}, [], [])


LARGE = [n + d for n in (1 << 8, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 62) for d in (-1, 0, 1)]


def test_large_numbers(tmp_path: Path) -> None:
    tensors = specs(**{f"rows.{size}": ("BF16", (size, 1)) for size in LARGE})
    stored = []
    for size, key in zip(LARGE, tensors, strict=True):
        stored.append(StoredChunk(key, ((0, size - 1), (0, 1)), "__0_0.distcp", size, 7))
        stored.append(StoredChunk(key, ((size - 1, size), (0, 1)), "__0_1.distcp", 0, size))
    check(tmp_path, tensors, [], stored)


@pytest.mark.parametrize("count", [300, 66_000])
def test_many_names(count: int, tmp_path: Path) -> None:
    """Texts are referred to by numbers of one byte or of four."""
    tensors = {f"w.{n}": TensorSpec(f"w.{n}", (2,), "U8") for n in range(300)}
    objects = [f"o.{n}" for n in range(300, count)]
    stored = [
        StoredChunk(key, ((0, 2),) if key in tensors else (), f"__0_{n % 7}.distcp", n, 5)
        for n, key in enumerate((*tensors, *objects))
    ]
    data = metadata_bytes(tensors, objects, stored)
    assert data.count(b"w.299") == data.count(b"w.0") == 1
    found = pickle.loads(data)
    assert list(found.state_dict_metadata) == [*tensors, *objects]
    for (place, info), chunk in zip(found.storage_data.items(), stored, strict=True):
        assert (place.fqn, info) == (chunk.key, _StorageInfo(chunk.file, chunk.offset, 5))
    (tmp_path / ".metadata").write_bytes(data)
    read = read_metadata(tmp_path)
    assert (read.tensors, read.objects) == (tensors, objects)
    assert [*read.chunks, *read.stored_objects] == stored


def test_names_that_are_long_or_of_any_script(tmp_path: Path) -> None:
    names = ["x" * 255, "x" * 256, "y" * 900, "größe.层.🙂", "Size", "offset", "torch"]
    tensors = {name: TensorSpec(name, (3,), "BF16") for name in names}
    check(tmp_path, tensors, ["Metadata", "h."], whole(tensors, ["Metadata", "h."]))


names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9)
sizes = st.integers(0, 5) | st.sampled_from(LARGE)


@given(
    tensors=st.dictionaries(
        names, st.tuples(st.lists(sizes, max_size=5).map(tuple), st.sampled_from(DTYPE_NAMES))
    ),
    objects=st.sets(names),
)
@settings(deadline=None, max_examples=60)
def test_any_index(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[tuple[int, ...], str]],
    objects: set[str],
) -> None:
    named = {key: TensorSpec(key, shape, dtype) for key, (shape, dtype) in tensors.items()}
    others = sorted(objects - named.keys())
    check(tmp_path_factory.mktemp("index"), named, others, whole(named, others))


def test_what_torch_saves_is_described_alike(tmp_path: Path) -> None:
    """The index of PyTorch's own save, made again of what is read of it."""
    from torch.distributed import checkpoint as dcp

    state = {
        "a.weight": torch.ones(5, 3, dtype=torch.bfloat16),
        "b": torch.tensor(2.5),
        "c": torch.arange(7),
        "d.extra": io.BytesIO(b"state"),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    saved = pickle.loads((tmp_path / ".metadata").read_bytes())
    read = read_metadata(tmp_path)
    chunks = [*read.chunks, *read.stored_objects]
    found = pickle.loads(metadata_bytes(read.tensors, read.objects, chunks))
    assert found.state_dict_metadata == saved.state_dict_metadata
    assert found.storage_data == saved.storage_data
    assert found.version == saved.version
    assert vars(found).keys() == vars(saved).keys()


def test_integers_as_python_pickles_them() -> None:
    around = [n + d for bit in range(64) for n in (1 << bit,) for d in (-1, 0, 1)]
    for number in (*around, *range(-300, 70_000), -(1 << 31), -(1 << 31) + 1):
        program = b"\x80\x02" + integer(number) + b"."
        assert program == pickle.dumps(number, protocol=2), number
    for length in range(7):
        numbers = tuple(LARGE[:length])
        found = pickle.loads(b"\x80\x02" + integers(numbers) + b".")
        assert found == numbers
        assert type(found) is tuple
