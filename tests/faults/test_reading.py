"""Damaged, contradictory and hostile weight files: each is an error that names the culprit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.bridge.errors import BridgeError, CheckpointError
from megatron.bridge.models.hf_pretrained.side_files import side_files
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from model_folders import INDEX, SHARDS, edit_index, safetensors_bytes, write_example, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_example(tmp_path)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorIndex.from_folder(folder)
    assert caught.value.exit_status == 2
    return str(caught.value)


def rewrite_shard(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the tensors of one shard, as another program would have written them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- the index against the shards: what the headers of the shards say counts ---


def test_key_in_the_index_only(folder: Path) -> None:
    rewrite_shard(folder / SHARDS[0], lambda tensors: tensors.pop("a.bias"))
    assert "a.bias" not in TensorIndex.from_folder(folder)


def test_key_in_a_shard_only(folder: Path) -> None:
    content = edit_index(folder)
    del content["weight_map"]["b.scale"]
    write_json(folder / INDEX, content)
    assert TensorIndex.from_folder(folder)["b.scale"].file.name == SHARDS[1]


def test_key_in_two_shards(folder: Path) -> None:
    rewrite_shard(
        folder / SHARDS[1], lambda tensors: tensors.update({"a.bias": tensors["b.scale"].clone()})
    )
    said = f"a.bias: it is in 2 shards, {SHARDS[0]}, {SHARDS[1]}, which differ in it"
    assert said in refused(folder)


def test_the_same_key_in_two_shards(folder: Path) -> None:
    """transformers reads the one or the other."""
    from safetensors.torch import load_file

    bias = load_file(folder / SHARDS[0])["a.bias"]
    rewrite_shard(folder / SHARDS[1], lambda tensors: tensors.update({"a.bias": bias}))
    index = TensorIndex.from_folder(folder)
    assert index.read("a.bias").tolist() == bias.tolist()
    assert ["a.bias" in shard.names for shard in index.shards] == [True, True, False]
    other = bias.clone()
    other[-1] += 1
    rewrite_shard(folder / SHARDS[1], lambda tensors: tensors.update({"a.bias": other}))
    assert "which differ in it" in refused(folder)


def test_key_in_another_shard_than_stated(folder: Path) -> None:
    content = edit_index(folder)
    content["weight_map"]["a.bias"] = SHARDS[2]
    write_json(folder / INDEX, content)
    assert TensorIndex.from_folder(folder)["a.bias"].file.name == SHARDS[0]


@pytest.mark.parametrize(
    "metadata", [{"total_size": 1}, {"total_size": "64"}, {"total_size": None}, {}, None, 3, []]
)
def test_what_the_index_says_of_itself_means_nothing(folder: Path, metadata: object) -> None:
    whole = TensorIndex.from_folder(folder).total_bytes
    content = edit_index(folder) | {"metadata": metadata}
    write_json(folder / INDEX, content)
    index = TensorIndex.from_folder(folder)
    assert index.index_metadata == (metadata if isinstance(metadata, dict) else {})
    assert index.total_bytes == whole


def test_missing_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: the file is missing" in refused(folder)


def test_a_weight_file_that_the_index_does_not_mention(folder: Path) -> None:
    """It lies beside the model; transformers does not read it."""
    names = set(TensorIndex.from_folder(folder))
    (folder / "value_head.safetensors").write_bytes((folder / SHARDS[0]).read_bytes())
    assert set(TensorIndex.from_folder(folder)) == names
    assert Path("value_head.safetensors") in side_files(folder)
    assert Path(SHARDS[0]) not in side_files(folder)


def test_one_file_beside_an_index_of_others_is_the_model(folder: Path) -> None:
    """As for transformers, which looks for it first."""
    shutil.copy(folder / SHARDS[1], folder / "model.safetensors")
    index = TensorIndex.from_folder(folder)
    assert set(index) == {"b.weight", "b.scale"}
    assert [shard.file_name for shard in index.shards] == ["model.safetensors"]
    assert index.index_metadata is None
    assert {Path(INDEX), *map(Path, SHARDS)} <= set(side_files(folder))


def test_an_index_of_the_one_file_belongs_to_it(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "model.safetensors")
    names = TensorIndex.from_folder(folder)
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(names, "model.safetensors")})
    assert TensorIndex.from_folder(folder).index_metadata == {}
    assert Path(INDEX) not in side_files(folder)


def test_files_with_a_number_behind_the_suffix(folder: Path) -> None:
    content = edit_index(folder)
    changed = {name: f"model.safetensors-{n:05}-of-00003" for n, name in enumerate(SHARDS)}
    for name, other in changed.items():
        (folder / name).rename(folder / other)
    content["weight_map"] = {name: changed[file] for name, file in content["weight_map"].items()}
    write_json(folder / INDEX, content)
    index = TensorIndex.from_folder(folder)
    assert [shard.file_name for shard in index.shards] == sorted(changed.values())
    assert not set(map(Path, changed.values())) & set(side_files(folder))


def test_hidden_files_do_not_count(folder: Path) -> None:
    (folder / f"._{SHARDS[0]}").write_bytes(b"what some systems leave beside a file")
    TensorIndex.from_folder(folder)


def test_all_problems_in_one_error(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[2]).write_bytes(b"")
    os.truncate(folder / SHARDS[0], 300)
    message = refused(folder)
    assert all(culprit in message for culprit in SHARDS)


# --- an index that leads elsewhere, or is none ---


@pytest.mark.parametrize(
    "target",
    ["/etc/model.safetensors", "../model.safetensors", "sub/../../model.safetensors",
     ".hidden/model.safetensors", "sub/..", "..", "", ".", "sub/",
     "..\\model.safetensors", "model.safetensors\0", "C:\\model.safetensors", "config.json"],
)  # fmt: skip
def test_index_pointing_outside_the_folder(folder: Path, target: str) -> None:
    elsewhere = folder.parent / "model.safetensors"
    elsewhere.write_bytes((folder / SHARDS[0]).read_bytes())
    content = edit_index(folder)
    content["weight_map"]["a.bias"] = target
    write_json(folder / INDEX, content)
    message = refused(folder)
    assert f"a.bias points to {target!r}, which is not the path of a *.safetensors file" in message


def test_duplicate_key_in_the_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"a.weight"', '"a.bias"', 1))
    assert "duplicate key 'a.bias'" in refused(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "{",
            "cannot be read: it is not JSON from line 1, column 2 on; download it again",
        ),
        ("[]", "expected a JSON object, found list"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {}}', "weight_map must map"),
        ('{"weight_map": {"a": 1}}', "weight_map must map"),
        ("[" * 200_000, "cannot be read"),
        ("\udcff", "it is not UTF-8 text: byte 0xff at offset 0; download it again"),
    ],
)
def test_invalid_index(folder: Path, text: str, reason: str) -> None:
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    message = refused(folder)
    assert INDEX in message
    assert reason in message


def test_the_next_step_is_said_once(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    os.truncate(folder / SHARDS[0], 300)
    heading, *lines = refused(folder).splitlines()
    assert heading == (
        f"{folder}: the weights cannot be used; download the files named here again, or mend them:"
    )
    assert [line.split(":")[0] for line in lines] == [f"  - {name}" for name in SHARDS[:2]]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_files_without_an_index(folder: Path, count: int) -> None:
    """Three are named, and no more are hinted at than there are."""
    (folder / INDEX).unlink()
    for number, name in enumerate(SHARDS):
        (folder / name).rename(folder / f"{number}.safetensors")
    (folder / "2.safetensors").unlink()
    for number in range(2, count):
        shutil.copy(folder / "0.safetensors", folder / f"{number}.safetensors")
    shown = ", ".join(f"{number}.safetensors" for number in range(min(count, 3)))
    dots = ", ..." if count > 3 else ""
    message = refused(folder)
    assert (
        f"{count} safetensors files ({shown}{dots}), and neither model.safetensors nor" in message
    )


def test_index_that_is_a_dangling_link_is_not_passed_over(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("gone")
    for file_name in SHARDS[1:]:  # what is left would do without an index
        (folder / file_name).unlink()
    assert f"{INDEX}: the weight index cannot be read" in refused(folder)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "no safetensors weights" in refused(tmp_path)


def test_shards_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert f"3 safetensors files ({SHARDS[0]}" in refused(folder)


# --- one file ---


def test_metadata_that_is_null_is_none(folder: Path) -> None:
    """As for the safetensors library."""
    from safetensors import safe_open

    for path in folder.glob("model*"):
        path.unlink()
    path = folder / "model.safetensors"
    tensor = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    path.write_bytes(safetensors_bytes({"__metadata__": None, "a": tensor}, b"\1\2"))
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").tolist() == [1, 2]
    index = TensorIndex.from_folder(folder)
    assert index.read("a").tolist() == [1, 2]
    assert index.shards[0].metadata is None


def test_truncated_data(folder: Path) -> None:
    path = folder / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{SHARDS[0]}: is truncated" in refused(folder)


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_truncation_at_any_byte(tmp_path: Path, data: st.DataObject) -> None:
    write_example(tmp_path)
    path = tmp_path / SHARDS[1]
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert SHARDS[1] in refused(tmp_path)


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_flipped_bit_in_a_header_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Never another exception than ours, never a read outside the file."""
    write_example(tmp_path)
    path = tmp_path / SHARDS[2]
    content = bytearray(path.read_bytes())
    header_bytes = 8 + struct.unpack("<Q", content[:8])[0]
    position = data.draw(st.integers(0, header_bytes - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        index = TensorIndex.from_folder(tmp_path)
    except BridgeError as error:
        assert SHARDS[2] in str(error)  # noqa: PT017
    else:
        for name in index:
            index.read(name)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is truncated: 0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "its length is 9223372036854775808 bytes"),
        (struct.pack("<Q", 99_000_000) + b"{}", "is truncated: the header needs"),
        (safetensors_bytes(b"{"), "the header is invalid"),
        (safetensors_bytes(b"[]"), "expected a JSON object, found list"),
        (safetensors_bytes(b"\xff\xfe{}"), "the header is invalid"),
        (safetensors_bytes(b"[" * 200_000), "nested too deeply"),
        (safetensors_bytes({"w": 1}), "'w': expected exactly dtype, shape and data_offsets"),
        (safetensors_bytes({"w": entry(extra=1)}), "'w': expected exactly"),
        (safetensors_bytes({"w": entry(dtype="F4")}, bytes(24)), "w: dtype 'F4' is not supported"),
        (safetensors_bytes({"w": entry(dtype=["F32"])}, bytes(24)), "is not supported"),
        (safetensors_bytes({"w": entry(shape=[2, -3])}, bytes(24)), "w: shape must be"),
        (safetensors_bytes({"w": entry(shape=[2, 3.0])}, bytes(24)), "w: shape must be"),
        (safetensors_bytes({"w": entry(shape=[2, True])}, bytes(24)), "w: shape must be"),
        (safetensors_bytes({"w": entry(data_offsets=[0])}, bytes(24)), "w: data_offsets must be"),
        (safetensors_bytes({"w": entry(data_offsets=[24, 0])}, bytes(24)), "needs 24 bytes"),
        (safetensors_bytes({"w": entry(shape=[2, 4])}, bytes(24)), "needs 32 bytes"),
        (safetensors_bytes({"w": entry(shape=[2**40, 2**40])}, bytes(24)), "needs"),
        (safetensors_bytes({"w": entry(data_offsets=[8, 32])}, bytes(32)), "a gap before w"),
        (safetensors_bytes({"v": entry(), "w": entry()}, bytes(24)), "an overlap before w"),
        (safetensors_bytes({"w": entry()}, bytes(23)), "is truncated"),
        (safetensors_bytes({"w": entry()}, bytes(25)), "has 1 bytes behind the last tensor"),
        (safetensors_bytes({"__metadata__": {"format": 1}}), "must map strings to strings"),
        (safetensors_bytes({"__metadata__": []}), "must map strings to strings"),
    ],
)
def test_invalid_header(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refused(tmp_path)
    assert "model.safetensors" in message
    assert reason in message


def test_duplicate_key_in_a_header(tmp_path: Path) -> None:
    one = f'"w":{json.dumps(entry())}'
    (tmp_path / "model.safetensors").write_bytes(
        safetensors_bytes(f"{{{one},{one}}}".encode(), bytes(24))
    )
    assert "duplicate key 'w'" in refused(tmp_path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is not a regular file" in refused(tmp_path)


def test_a_file_that_shrinks_after_it_was_indexed(folder: Path) -> None:
    index = TensorIndex.from_folder(folder)
    os.truncate(folder / SHARDS[0], 200)
    with pytest.raises(CheckpointError, match="was changed after its header was read"):
        index.read("a.weight")


def test_a_file_that_vanishes_after_it_was_indexed(folder: Path) -> None:
    index = TensorIndex.from_folder(folder)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: cannot be read"):
        index.read("a.weight")


def test_a_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    index = TensorIndex.from_folder(folder)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: a\.weight cannot be read: Input/out"):
        index.read("a.weight")
