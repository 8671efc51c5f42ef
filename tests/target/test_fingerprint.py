"""A source's fingerprint: every change of a file that is read shows, and nothing else does."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from megatron.bridge.errors import CheckpointError, SourceChanged
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.target.fingerprint import (
    Fingerprint,
    check_unchanged,
    hf_fingerprint,
    megatron_fingerprint,
)

NAMES = ("config.json", "a.safetensors", "__0_0.distcp")


def shard(name: str = "weight", data: bytes = b"12345678") -> bytes:
    entry = {name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    header = json.dumps(entry).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(shard())
    (folder / "__0_0.distcp").write_bytes(bytes(33))
    for name in NAMES:
        os.utime(folder / name, ns=(5, 7_000_000_001))
    return folder


def rewrite(path: Path, content: bytes, *, at: int = 7_000_000_001) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(5, at))


def test_the_same_files_give_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = Fingerprint.of(folder, NAMES)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in NAMES:  # as in the hub's cache
        (linked / name).symlink_to(folder / name)
    after = Fingerprint.of(linked, [*reversed(NAMES), "config.json"])
    assert after == before
    assert after.changed_since(before) == []
    assert Fingerprint.from_json(json.loads(json.dumps(before.to_json()))) == before
    check_unchanged(before)
    check_unchanged(before, linked)


@pytest.mark.parametrize(
    ("name", "content", "at", "change"),
    [
        ("config.json", b"[]", 7_000_000_001, "config.json: other contents"),
        ("config.json", b"{}", 7_000_000_002, "config.json: modified"),
        ("config.json", b"{  }", 9, "config.json: size 2 -> 4"),
        ("a.safetensors", shard("weighs"), 7_000_000_001, "a.safetensors: another header"),
        ("a.safetensors", shard(data=b"22345678"), 9, "a.safetensors: modified"),
        ("__0_0.distcp", bytes(34), 7_000_000_001, "__0_0.distcp: size 33 -> 34"),
        ("__0_0.distcp", b"1" * 33, 9, "__0_0.distcp: modified"),
    ],
)
def test_a_change_is_named(folder: Path, name: str, content: bytes, at: int, change: str) -> None:
    before = Fingerprint.of(folder, NAMES)
    rewrite(folder / name, content, at=at)
    assert Fingerprint.of(folder, NAMES).changed_since(before) == [change]
    with pytest.raises(SourceChanged, match=change):
        check_unchanged(before)


def test_only_the_head_of_weights_is_read(folder: Path) -> None:
    """Tensor data are not: a change of them shows by size or time."""
    before = Fingerprint.of(folder, NAMES)
    rewrite(folder / "a.safetensors", shard(data=b"22345678"))
    rewrite(folder / "__0_0.distcp", b"1" * 33)
    assert Fingerprint.of(folder, NAMES) == before


def test_files_that_come_and_go(folder: Path) -> None:
    before = Fingerprint.of(folder, NAMES)
    (folder / "config.json").unlink()
    (folder / "b.safetensors").write_bytes(shard("b"))
    after = Fingerprint.of(folder, ["a.safetensors", "b.safetensors", "__0_0.distcp"])
    assert after.changed_since(before) == ["b.safetensors: new", "config.json: missing"]
    with pytest.raises(SourceChanged, match=r"config\.json: missing"):
        check_unchanged(before)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        Fingerprint.of(folder, NAMES)


def test_many_changes_are_a_short_message(tmp_path: Path) -> None:
    names = [f"file{number}" for number in range(20)]
    for name in names:
        (tmp_path / name).write_text(name)
    before = Fingerprint.of(tmp_path, names)
    for name in names:
        (tmp_path / name).write_text("other")
    with pytest.raises(SourceChanged, match=r"and 17 more") as error:
        check_unchanged(before)
    assert len(str(error.value).splitlines()) <= 6
    assert len(error.value.problems) == 20


def test_a_pipe_is_refused_instead_of_waited_for(folder: Path) -> None:
    before = Fingerprint.of(folder, NAMES)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Fingerprint.of(folder, NAMES)
    with pytest.raises(SourceChanged, match="not a regular file"):
        check_unchanged(before)


def test_what_a_hugging_face_folder_consists_of(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    hf = PreTrainedVLM.from_pretrained(folder)
    names = [file.name for file in hf_fingerprint(hf, side_files=False).files]
    assert names == ["a.safetensors", "config.json"]
    names = [file.name for file in hf_fingerprint(hf, side_files=True).files]
    assert {"tokenizer.json", "config.json", "a.safetensors"} <= set(names)
    assert hf_fingerprint(PreTrainedVLM.from_config({}), side_files=True).files == ()


def test_what_a_megatron_checkpoint_consists_of(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("12")
    iteration = folder / "iter_0000012"
    iteration.mkdir()
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "run_config.yaml", "notes.txt"):
        (iteration / name).write_text(name)
    fingerprint = megatron_fingerprint(folder)
    names = [file.name for file in fingerprint.files]
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "run_config.yaml"]
    (iteration / ".metadata").write_text("another")
    with pytest.raises(SourceChanged, match=r"\.metadata: size 9 -> 7"):
        check_unchanged(fingerprint)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../x", "a//x", "a\0", "\ud800"], ids=repr
)
def test_names_outside_of_the_folder_are_refused(name: str) -> None:
    file = {"name": name, "nbytes": 1, "mtime_ns": 2, "head": None}
    with pytest.raises(ValueError, match="inside the folder"):
        Fingerprint.from_json({"files": [file]})
