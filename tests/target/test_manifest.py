"""Manifest, journal and checksums: what is recorded comes back; damage and lies are found."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.bridge.engine.pieces import FileCopy, Literal, OutputFile, TensorData, pieces_of
from megatron.bridge.errors import CheckpointError
from megatron.bridge.target.checksums import check_files
from megatron.bridge.target.fingerprint import Fingerprint, SourceFile
from megatron.bridge.target.job import Job, layout_digest
from megatron.bridge.target.journal import Journal, Recorded, boot_id, write_journal
from megatron.bridge.target.manifest import (
    MANIFEST_FILE,
    Manifest,
    PieceKey,
    read_manifest,
)

SOURCE = Fingerprint((SourceFile("config.json", 12, 34, "ab"), SourceFile("b.distcp", 5, 6, None)))
JOB = Job("import", {"experts": None, "shards": [3, 5]}, {"source": SOURCE}, "00ff", "1.2")
CONTENT = {"a.bin": bytes(range(100)), "sub/b.bin": b"b" * 37, "empty": b""}
CUTS = {"a.bin": (0, 32, 64, 100), "sub/b.bin": (0, 37), "empty": (0,)}


def finished(content: Mapping[str, bytes] = CONTENT) -> dict[PieceKey, int]:
    return {
        PieceKey(name, begin, end - begin): zlib.crc32(content[name][begin:end])
        for name, cuts in CUTS.items()
        for begin, end in pairwise(cuts)
    }


SIZES = {name: len(content) for name, content in CONTENT.items()}
MANIFEST = Manifest.of(JOB, SIZES, finished())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST_FILE).write_text(MANIFEST.to_text())
    return tmp_path


# --- the manifest ---


def test_it_comes_back(folder: Path) -> None:
    assert read_manifest(folder) == MANIFEST
    assert dict(MANIFEST.pieces()) == finished()
    assert MANIFEST.nbytes == 137


def test_it_does_not_depend_on_the_order_of_work() -> None:
    again = Manifest.of(JOB, dict(reversed(SIZES.items())), dict(reversed(finished().items())))
    assert again.to_text() == MANIFEST.to_text()


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_pieces_that_do_not_tile_are_no_manifest() -> None:
    for key in finished():
        rest = {other: crc for other, crc in finished().items() if other != key}
        with pytest.raises(CheckpointError, match=f"not complete: {key.file}"):
            Manifest.of(JOB, SIZES, rest)
    overlapping = finished() | {PieceKey("a.bin", 31, 1): 0}
    with pytest.raises(CheckpointError, match=r"a\.bin: bytes from 31 on are twice there"):
        Manifest.of(JOB, SIZES, overlapping)


def document() -> dict[str, Any]:
    return json.loads(MANIFEST.to_text())


LIES: dict[str, tuple[list[Any], Any]] = {
    "a file outside": (["files", 0, "name"], "../a.bin"),
    "an absolute name": (["files", 0, "name"], "/a.bin"),
    "the manifest itself": (["files", 0, "name"], MANIFEST_FILE),
    "a name that is no text": (["files", 0, "name"], 7),
    "a file twice": (["files", 0, "name"], "empty"),
    "a negative size": (["files", 0, "nbytes"], -100),
    "a wrong size": (["files", 0, "nbytes"], 101),
    "a size that is no number": (["files", 0, "nbytes"], 100.0),
    "a huge size": (["files", 0, "nbytes"], 1 << 63),
    "a gap": (["files", 0, "pieces", 1], [33, 31, 5]),
    "an overlap": (["files", 0, "pieces", 1], [31, 33, 5]),
    "an empty piece": (["files", 1, "pieces"], [[0, 0, 0]]),
    "a piece of a negative length": (["files", 0, "pieces", 1], [32, -1, 5]),
    "a truth value for a number": (["files", 0, "pieces", 0], [False, 32, 5]),
    "a checksum of 33 bits": (["files", 0, "pieces", 0], [0, 32, 1 << 32]),
    "pieces that are an object": (["files", 0, "pieces"], {}),
    "another format": (["job", "format"], 2),
    "an unknown key": (["job", "more"], 1),
    "no sources": (["job", "sources"], None),
    "a source that is no fingerprint": (["job", "sources", "source"], {"files": [1]}),
    "no job": (["job"], []),
}


@pytest.mark.parametrize(("path", "value"), LIES.values(), ids=LIES)
def test_lies_are_refused(folder: Path, path: list[Any], value: Any) -> None:
    changed = document()
    *outer, last = path
    place = changed
    for step in outer:
        place = place[step]
    place[last] = value
    (folder / MANIFEST_FILE).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Manifest.from_text(text)


@given(st.data())
def test_one_wrong_value_is_refused_or_a_manifest(data: st.DataObject) -> None:
    """Whatever is put in some place: a ValueError, or a manifest whose pieces tile its files."""
    place: Any = document()
    changed = place
    while True:
        steps = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not steps:
            return
        step = data.draw(st.sampled_from(steps))
        if not isinstance(place[step], dict | list) or data.draw(st.booleans()):
            break
        place = place[step]
    place[step] = data.draw(JSON)
    try:
        manifest = Manifest.from_text(json.dumps(changed).encode())
    except ValueError:
        return
    for file in manifest.files:
        assert sum(piece.nbytes for piece in file.pieces) == file.nbytes


def test_a_manifest_is_bounded_and_a_file(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a hole: takes no room
    with pytest.raises(CheckpointError, match="the limit is"):
        read_manifest(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_manifest(folder)


# --- checksums ---


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_written_is_found_good(folder: Path, workers: int) -> None:
    assert check_files(folder, MANIFEST, workers=workers) == []


def test_every_flipped_bit_is_found(folder: Path) -> None:
    for name in ("a.bin", "sub/b.bin"):
        for position in (0, 31, 32, len(CONTENT[name]) - 1):
            changed = bytearray(CONTENT[name])
            changed[position] ^= 1
            (folder / name).write_bytes(changed)
            [fault] = check_files(folder, MANIFEST)
            assert fault.file == name
            assert fault.offset <= position < fault.offset + fault.nbytes
            assert fault.problem.startswith("CRC-32")
            (folder / name).write_bytes(CONTENT[name])


def test_missing_and_short_files_are_found(folder: Path) -> None:
    (folder / "a.bin").write_bytes(CONTENT["a.bin"][:-1])
    (folder / "sub/b.bin").unlink()
    assert check_files(folder, MANIFEST) == [
        ("a.bin", 0, 100, "size 99, expected 100"),
        ("sub/b.bin", 0, 37, "missing"),
    ]


def test_pieces_longer_than_a_block(tmp_path: Path) -> None:
    content = bytes(range(251)) * 20_011  # 5 MB: several blocks and a rest
    (tmp_path / "long").write_bytes(content)
    key = PieceKey("long", 0, len(content))
    manifest = Manifest.of(JOB, {"long": len(content)}, {key: zlib.crc32(content)})
    assert check_files(tmp_path, manifest) == []
    (tmp_path / "long").write_bytes(content[:-1] + b"\0")
    assert [fault.file for fault in check_files(tmp_path, manifest)] == ["long"]


def test_progress_counts_every_byte(folder: Path) -> None:
    told: list[Any] = []

    class Told:
        def start(self, task: str, total_bytes: int) -> None:
            told.append((task, total_bytes))

        def advance(self, done_bytes: int) -> None:
            told.append(done_bytes)

    check_files(folder, MANIFEST, Told())
    assert told[0] == ("checksums", 137)
    assert sum(told[1:]) == 137


# --- the journal ---


def write_all(journal: Journal) -> None:
    for key, crc in finished().items():
        journal.record(key, crc)
    journal.close()


def test_a_journal_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_all(Journal(path, JOB))
    assert Recorded.read(path) == Recorded(JOB, boot_id(), finished())
    with pytest.raises(FileExistsError):
        Journal(path, JOB)
    write_journal(tmp_path / "again.jsonl", JOB, finished())
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_a_journal_cut_anywhere_loses_at_most_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_all(Journal(path, JOB))
    whole = path.read_bytes()
    pieces = list(finished().items())
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        known = Recorded.read(path)
        if lines == 0:
            assert known is None
        else:
            assert known is not None
            assert known.pieces == dict(pieces[: lines - 1])


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b'{"file":"a.bin","offset":64,"nbytes":36}',
        b'{"file":"../a","offset":64,"nbytes":36,"crc32":1}',
        b'{"file":"a.bin","offset":-1,"nbytes":36,"crc32":1}',
        b'{"file":"a.bin","offset":64,"nbytes":36,"crc32":4294967296}',
    ],
    ids=["zeros", "no checksum", "a file outside", "a negative offset", "a checksum of 33 bits"],
)
def test_nothing_behind_a_damaged_line_is_believed(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    write_all(Journal(path, JOB))
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    known = Recorded.read(path)
    assert known is not None
    assert known.pieces == dict(list(finished().items())[:1])


def test_threads_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", JOB)

    def write(thread: int) -> None:
        for number in range(200):
            journal.record(PieceKey(f"file-{thread}", number, 1), number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = Recorded.read(journal.path)
    assert known is not None
    assert len(known.pieces) == 800
    journal.close()
    with pytest.raises(OSError, match="closed"):
        journal.record(PieceKey("late", 0, 1), 0)


# --- the job ---


def test_what_makes_a_job_another_one() -> None:
    assert Job.from_json(json.loads(json.dumps(JOB.to_json()))).differences(JOB) == []
    changed = Fingerprint((SourceFile("config.json", 13, 34, "ab"), SOURCE.files[1]))
    cases = {
        "command: was import, now export": replace(JOB, command="export"),
        "megatron-bridge: was 1.2, now 1.3": replace(JOB, package="1.3"),
        'option experts: was not given, now "fused"': replace(
            JOB, options={"experts": "fused", "shards": (3, 5)}
        ),
        "option shards: was [3, 5], now [3]": replace(JOB, options={"shards": [3]}),
        "source: config.json: size 12 -> 13": replace(JOB, sources={"source": changed}),
        "the layout of the output files": replace(JOB, layout="00fe"),
    }
    for difference, job in cases.items():
        assert job.differences(JOB) == [difference]


def test_the_layout_digest_sees_every_byte_but_not_where_sources_lie() -> None:
    def digest(size: int = 64, name: str = "w", text: bytes = b"head", home: str = "/x") -> str:
        data = [TensorData(name, ((at, at + 3), (0, 5)), "BF16") for at in (0, 3)]
        copied = FileCopy(Path(home, "tokenizer.json"), 0, 11)
        files = [OutputFile("a", (Literal(text), *data)), OutputFile("b", (copied,))]
        return layout_digest(piece for file in files for piece in pieces_of(file, size))

    assert digest() == digest(home="/y")
    assert len({digest(), digest(size=32), digest(name="v"), digest(text=b"Head")}) == 4
