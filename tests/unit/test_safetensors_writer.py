"""Shards that are written: equal to those of the safetensors library, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.bridge.dtypes import DTYPE_NAMES, itemsize, safetensors_dtype, torch_dtype
from megatron.bridge.errors import CheckpointError, TargetExists
from megatron.bridge.formats.safetensors_writer import (
    index_text,
    split_into_shards,
    write_index,
    write_shard,
)
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.tensors.spec import TensorSpec
from model_folders import INDEX, SHARDS, write_example


def spec(name: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name, shape, dtype)


def rewrite(source: Path, target: Path) -> None:
    """Every shard of a folder, through our reader and our writer."""
    with TensorIndex.from_folder(source) as index:
        for shard in index.shards:
            specs = [index[name] for name in shard.names]
            write_shard(target / shard.file_name, specs, index.read, shard.metadata)


def test_shards_come_back_byte_for_byte(tmp_path: Path) -> None:
    write_example(tmp_path / "source")
    (tmp_path / "target").mkdir()
    rewrite(tmp_path / "source", tmp_path / "target")
    for file_name in SHARDS:
        written = (tmp_path / "target" / file_name).read_bytes()
        assert written == (tmp_path / "source" / file_name).read_bytes()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from(
    ["float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "uint8", "bool", "complex64"]
)


@given(
    tensors=st.dictionaries(
        names.filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(shapes, dtypes),
        min_size=1,  # without a tensor the library writes metadata as invalid JSON
        max_size=6,
    ),
    metadata=st.none() | st.dictionaries(names, st.text(max_size=5), max_size=3),
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_file_comes_back_byte_for_byte(
    tmp_path: Path,
    tensors: dict[str, tuple[tuple[int, ...], str]],
    metadata: dict[str, str] | None,
) -> None:
    import torch
    from safetensors.torch import save_file

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(exist_ok=True)
    target.mkdir(exist_ok=True)
    (target / "model.safetensors").unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(3)
    content = {
        name: (torch.randn(shape, generator=generator) * 9).to(getattr(torch, dtype))
        for name, (shape, dtype) in tensors.items()
    }
    save_file(content, source / "model.safetensors", metadata=metadata)
    rewrite(source, target)
    written = (target / "model.safetensors").read_bytes()
    assert written == (source / "model.safetensors").read_bytes()


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    values = {"w": torch.randn(4, 3).t(), "s": torch.tensor(7, dtype=torch.int32)}
    specs = [spec("w", (3, 4)), spec("s", (), "I32")]
    write_shard(tmp_path / "x.safetensors", specs, values.__getitem__)
    read = load_file(tmp_path / "x.safetensors")
    assert list(read) == ["w", "s"]
    assert all(torch.equal(read[name], value) for name, value in values.items())


def test_one_tensor_at_a_time_in_the_given_order(tmp_path: Path) -> None:
    import gc
    import weakref

    import torch

    asked: list[str] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def tensor(name: str) -> torch.Tensor:
        gc.collect()
        assert not any(reference() is not None for reference in alive), "the last one is still held"
        asked.append(name)
        value = torch.zeros(2, 3)
        alive.append(weakref.ref(value))
        return value

    write_shard(tmp_path / "x.safetensors", [spec(name, (2, 3)) for name in "cab"], tensor)
    assert asked == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("shape", "dtype", "found"),
    [((3, 2), "F32", "found F32 of shape (2, 3)"), ((2, 3), "F16", "found F32 of shape (2, 3)")],
)
def test_another_tensor_than_specified(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, found: str
) -> None:
    import torch

    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError) as caught:
        write_shard(path, [spec("w", shape, dtype)], lambda _: torch.zeros(2, 3))
    assert str(caught.value) == f"w: expected {dtype} of shape {shape}, {found}"
    assert not path.exists()


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TargetExists):
        write_shard(path, [], lambda _: None)  # type: ignore[arg-type, return-value]
    assert path.read_bytes() == b"old"
    with pytest.raises(TargetExists):
        write_index(path, {}, 0)


@pytest.mark.parametrize("name", ["w", "__metadata__"])
def test_a_name_given_twice(tmp_path: Path, name: str) -> None:
    specs = [spec("w", (1,)), spec(name, (1,))]
    with pytest.raises(CheckpointError, match=f"{name} is given twice, or is a reserved name"):
        write_shard(tmp_path / "x", specs, lambda _: None, {"format": "pt"})  # type: ignore[arg-type, return-value]


def test_a_full_disk(tmp_path: Path) -> None:
    import torch

    with pytest.raises(CheckpointError, match="/dev/full/x: cannot be written"):
        write_shard(Path("/dev/full/x"), [], lambda _: torch.zeros(1))
    target = tmp_path / "full.safetensors"

    def limited(_: str) -> Any:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return torch.zeros(9, 999)

    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CheckpointError, match=r"full\.safetensors: cannot be written"):
            write_shard(target, [spec("w", (9, 999))], limited)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not target.exists()


def test_index_is_written_as_transformers_does(tmp_path: Path) -> None:
    weight_map = {"b.weight": SHARDS[1], "b.scale": SHARDS[1]}
    text = index_text(weight_map, 98, {"producer": "x", "total_size": 1})
    content = {"metadata": {"producer": "x", "total_size": 98}, "weight_map": weight_map}
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_index(tmp_path / INDEX, weight_map, 98)
    assert (tmp_path / INDEX).read_text() == index_text(weight_map, 98)


def test_shards_are_filled_in_order() -> None:
    specs = [
        spec(name, (size,), "U8") for name, size in zip("abcdef", (4, 5, 3, 20, 6, 4), strict=True)
    ]
    shards = split_into_shards(specs, max_shard_size=10)
    assert {name: [spec.name for spec in shard] for name, shard in shards.items()} == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e", "f"],
    }


def test_one_shard_has_the_plain_name_and_wide_types_first() -> None:
    specs = [spec("b", (2,), "BF16"), spec("c", (2,), "F32"), spec("a", (2,), "BF16")]
    shards = split_into_shards(specs, max_shard_size=100)
    assert shards == {"model.safetensors": [specs[1], specs[2], specs[0]]}


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20), limit=st.integers(1, 40))
def test_every_tensor_is_in_one_shard_that_keeps_the_limit(sizes: list[int], limit: int) -> None:
    specs = [spec(f"{number:02}", (size,), "U8") for number, size in enumerate(sizes)]
    shards = split_into_shards(specs, limit)
    assert [spec for shard in shards.values() for spec in shard] == specs
    for shard in shards.values():
        assert shard
        assert len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit


def test_the_table_of_dtypes() -> None:
    import torch

    for name in DTYPE_NAMES:
        assert torch.empty(0, dtype=torch_dtype(name)).element_size() == itemsize(name)
        assert safetensors_dtype(torch_dtype(name)) == name
    with pytest.raises(CheckpointError, match="'F4' is not supported"):
        itemsize("F4")
    with pytest.raises(CheckpointError, match="complex128 has no safetensors name"):
        safetensors_dtype(torch.complex128)
