"""The index of a folder's tensors, and reading by slice."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from model_folders import INDEX, SHARDS, edit_index, write_example, write_json
from open_files import few_open_files


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("example")
    return folder, write_example(folder)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality, also for dtypes that cannot be compared."""
    import torch

    as_bytes = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def test_names_shapes_and_dtypes(example: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = example
    index = TensorIndex.from_folder(folder)
    assert set(index) == set(tensors)
    assert {name: info.shape for name, info in index.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert index["a.bias"].dtype == "F32"
    assert index["c.weight"].dtype == "F8_E4M3"
    assert index["b.scale"].nbytes == 2
    assert index["b.scale"].file == folder / SHARDS[1]
    assert index.total_bytes == sum(info.nbytes for info in index.values())
    assert index.index_metadata == {"total_size": index.total_bytes}


def test_order_is_that_of_the_files(example: tuple[Path, dict[str, Any]]) -> None:
    index = TensorIndex.from_folder(example[0])
    assert [shard.file_name for shard in index.shards] == list(SHARDS)
    assert [name for shard in index.shards for name in shard.names] == list(index)
    # safetensors puts wide types first.
    assert index.shards[0].names == ("a.bias", "a.weight")
    assert index.shards[2].names == ("c.steps", "c.empty", "c.weight")
    for shard in index.shards:
        offsets = [index[name].offset for name in shard.names]
        assert offsets == sorted(offsets)
        assert shard.metadata == {"format": "pt"}


def test_whole_tensors(example: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = example
    with TensorIndex.from_folder(folder) as index:
        for name, tensor in tensors.items():
            assert same(index.read(name), tensor), name


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=0, max_size=4)))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, tuple((start, stop) for start, stop in ends)


@given(case=boxes(), dtype=st.sampled_from(["bfloat16", "float32", "uint8", "float8_e4m3fn"]))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_box_is_the_slice_of_the_whole(
    tmp_path: Path, case: tuple[tuple[int, ...], tuple[tuple[int, int], ...]], dtype: str
) -> None:
    import torch
    from safetensors.torch import save_file

    shape, box = case
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
    # Neighbours on both sides: a wrong offset must not go unnoticed.
    around = {"a": torch.full((3,), -1.0), "z": torch.full((5,), 77, dtype=torch.uint8)}
    save_file({"m": whole, **around}, tmp_path / "model.safetensors")
    with TensorIndex.from_folder(tmp_path) as index:
        part = index.read("m", box)
    assert part.is_contiguous()
    assert same(part, whole[tuple(slice(*ends) for ends in box)])


def test_what_is_read_shares_no_memory(example: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = example
    index = TensorIndex.from_folder(folder)
    index.read("a.weight").zero_()
    index.read("a.weight", ((1, 3), (0, 3))).zero_()
    assert same(index.read("a.weight"), tensors["a.weight"])


@pytest.mark.parametrize(
    "box", [((0, 5),), ((0, 6), (0, 3)), ((-1, 5), (0, 3)), ((3, 2), (0, 3)), ()]
)
def test_a_box_that_does_not_fit(
    example: tuple[Path, dict[str, Any]], box: tuple[tuple[int, int], ...]
) -> None:
    index = TensorIndex.from_folder(example[0])
    with pytest.raises(
        CheckpointError, match=r"a\.weight: box .* does not fit into shape \(5, 3\)"
    ):
        index.read("a.weight", box)


def test_an_unknown_name(example: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'd\.weight'"):
        TensorIndex.from_folder(example[0]).read("d.weight")


def test_pickled_closed_and_used_by_threads(example: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = example
    index = TensorIndex.from_folder(folder)
    index.read("a.weight")
    copied = pickle.loads(pickle.dumps(index))
    index.close()
    assert dict(copied) == dict(index)
    names = list(tensors) * 20
    with ThreadPoolExecutor(4) as pool:
        for name, tensor in zip(names, pool.map(copied.read, names), strict=True):
            assert same(tensor, tensors[name])


def test_no_file_stays_open(example: tuple[Path, dict[str, Any]]) -> None:
    def open_files() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.readlink().suffix == ".safetensors" for link in links)

    before = open_files()
    index = TensorIndex.from_folder(example[0])
    assert open_files() == before
    index.read("a.weight")
    assert open_files() == before + 1
    del index
    assert open_files() == before


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """By several threads, each file twice."""
    import torch
    from safetensors.torch import save_file

    count = 200
    shards = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for number, shard in enumerate(shards):
        save_file({f"t{number}": torch.full((2, 3), number)}, tmp_path / shard)
    weight_map = {f"t{number}": shard for number, shard in enumerate(shards)}
    text = json.dumps({"metadata": {"total_size": count * 48}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    index = TensorIndex.from_folder(tmp_path)
    with few_open_files(100), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(index.read, [f"t{number}" for number in range(count)] * 2))
    assert [int(tensor[1, 2]) for tensor in found] == [*range(count), *range(count)]


def test_one_file_of_any_name_without_index(tmp_path: Path) -> None:
    write_example(tmp_path)
    (tmp_path / INDEX).unlink()
    for file_name in SHARDS[1:]:
        (tmp_path / file_name).unlink()
    index = TensorIndex.from_folder(tmp_path)
    assert set(index) == {"a.weight", "a.bias"}
    assert index.index_metadata is None


def test_symlinked_files_are_followed(tmp_path: Path) -> None:
    """The hub's cache is a folder of links to blobs beside it."""
    tensors = write_example(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert same(TensorIndex.from_folder(snapshot).read("b.weight"), tensors["b.weight"])


def test_an_index_without_total_size(tmp_path: Path) -> None:
    write_example(tmp_path)
    content = edit_index(tmp_path)
    del content["metadata"]
    write_json(tmp_path / INDEX, content)
    assert TensorIndex.from_folder(tmp_path).index_metadata == {}


def test_headers_are_read_without_torch_numpy_or_transformers(
    example: tuple[Path, dict[str, Any]],
) -> None:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from megatron.bridge.models.hf_pretrained.tensors import TensorIndex\n"
        "from megatron.bridge.models.hf_pretrained import config, vlm, reference\n"
        f"index = TensorIndex.from_folder(Path({str(example[0])!r}))\n"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors', 'huggingface_hub'}\n"
        "print(json.dumps([len(index), sorted(heavy & set(sys.modules))]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert json.loads(answer.stdout) == [7, []]
