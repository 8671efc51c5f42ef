"""Records, manifests and checksums: what is recorded comes back; damage and lies are found."""

from __future__ import annotations

import json
import os
import threading
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.bridge.engine.pieces import FileCopy, Literal, OutputFile, TensorData, pieces_of
from megatron.bridge.errors import CheckpointError
from megatron.bridge.target.checksums import check_files, with_checksums
from megatron.bridge.target.fingerprint import Fingerprint, SourceFile
from megatron.bridge.target.job import Job, layout_digest
from megatron.bridge.target.record import (
    MANIFEST_FILE,
    CheckedRange,
    FileRecord,
    Record,
    RecordWriter,
    UnreadRange,
    read_manifest,
    read_records,
    write_new_record,
)

SOURCE = Fingerprint((SourceFile("config.json", 12, 34, "ab"), SourceFile("b.distcp", 5, 6, None)))
JOB = Job("import", {"experts": None, "shards": [3, 5]}, {"source": SOURCE}, "00ff", "1.2")
CONTENT = {"a.bin": bytes(range(100)), "sub/b.bin": b"b" * 37, "empty": b""}
CUTS = {"a.bin": (0, 32, 64, 100), "sub/b.bin": (0, 37), "empty": (0,)}


def record(name: str) -> FileRecord:
    parts = [CONTENT[name][begin:end] for begin, end in pairwise(CUTS[name])]
    return FileRecord(name, tuple(CheckedRange(len(part), zlib.crc32(part)) for part in parts))


MANIFEST = Record(JOB, tuple(map(record, sorted(CONTENT))), complete=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST_FILE).write_bytes(MANIFEST.to_bytes())
    return tmp_path


# --- the manifest ---


def test_it_comes_back(folder: Path) -> None:
    assert read_manifest(folder) == MANIFEST
    assert MANIFEST.nbytes == 137
    assert [file.nbytes for file in MANIFEST.files] == [100, 0, 37]


def test_it_does_not_depend_on_the_order_of_work(folder: Path) -> None:
    files = list(reversed(MANIFEST.files))
    new = write_new_record(folder / "again.jsonl", JOB, files, complete=True)
    assert new.read_bytes() == MANIFEST.to_bytes()


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def document() -> list[Any]:
    """The manifest's lines: the job, "a.bin", "empty", "sub/b.bin"."""
    return [json.loads(line) for line in MANIFEST.to_bytes().splitlines()]


def text_of(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


LIES: dict[str, tuple[list[Any], Any]] = {
    "a file outside": ([1, "name"], "../a.bin"),
    "an absolute name": ([1, "name"], "/a.bin"),
    "the manifest itself": ([1, "name"], MANIFEST_FILE),
    "a name that is no text": ([1, "name"], 7),
    "a file twice": ([1, "name"], "empty"),
    "files that are not in order": ([1, "name"], "z"),
    "a negative size": ([1, "nbytes"], -100),
    "a wrong size": ([1, "nbytes"], 101),
    "a size that is no number": ([1, "nbytes"], 100.0),
    "a huge size": ([1, "nbytes"], 1 << 63),
    "a piece that is too short": ([1, "pieces", 1], [31, 5]),
    "an empty piece": ([2, "pieces"], [[0, 0]]),
    "a piece of a negative length": ([1, "pieces", 1], [-1, 5]),
    "a truth value for a number": ([1, "pieces", 0], [True, 5]),
    "a checksum of 33 bits": ([1, "pieces", 0], [32, 1 << 32]),
    "a piece without a checksum": ([1, "pieces", 0], [32]),
    "pieces that are an object": ([1, "pieces"], {}),
    "an unfinished target": ([0, "complete"], False),
    "another format": ([0, "job", "format"], 1),
    "an unknown key": ([0, "job", "more"], 1),
    "no sources": ([0, "job", "sources"], None),
    "a source that is no fingerprint": ([0, "job", "sources", "source"], {"files": [1]}),
    "a command that forges a line": ([0, "job", "command"], "import\nerror: forged"),
    "a version of 5000 characters": ([0, "job", "package"], "9" * 5000),
    "no job": ([0, "job"], []),
}


@pytest.mark.parametrize(("path", "value"), LIES.values(), ids=LIES)
def test_lies_are_refused(folder: Path, path: list[Any], value: Any) -> None:
    changed = document()
    *outer, last = path
    place = changed
    for step in outer:
        place = place[step]
    place[last] = value
    (folder / MANIFEST_FILE).write_bytes(text_of(changed))
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
        Record.from_bytes(text + b"\n")


@given(st.data())
def test_one_wrong_value_is_refused_or_a_manifest(data: st.DataObject) -> None:
    """Whatever is put in some place: a ValueError, or a manifest of files with pieces."""
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
        manifest = Record.from_bytes(text_of(changed))
    except ValueError:
        return
    for file in manifest.files:
        assert all(nbytes > 0 for nbytes, _ in file.pieces)


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
    whole = CheckedRange(len(content), zlib.crc32(content))
    manifest = Record(JOB, (FileRecord("long", (whole,)),), True)
    assert check_files(tmp_path, manifest) == []
    (tmp_path / "long").write_bytes(content[:-1] + b"\0")
    assert [fault.file for fault in check_files(tmp_path, manifest)] == ["long"]


def test_blocks_of_the_source_are_compared_with_it(tmp_path: Path) -> None:
    """Their bytes were never read, so they have no checksum until it is taken."""
    shared, own = bytes(range(1, 252)) * 40_021, b"own"
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, content in ((source, b"head" + shared), (target, own + shared)):
        folder.mkdir()
        (folder / "file").write_bytes(content)
    pieces = (CheckedRange(3, zlib.crc32(own)), UnreadRange(len(shared), 4, "file"))
    record = FileRecord("file", pieces)
    assert (record.nbytes, record.unread_bytes) == (3 + len(shared), len(shared))
    assert FileRecord.from_line(record.to_line()) == record
    manifest = Record(JOB, (record,), complete=True)
    assert check_files(target, manifest) == check_files(target, manifest, source=source) == []

    [checked] = with_checksums(target, [record])
    assert checked.unread_bytes == 0
    assert [piece.nbytes for piece in checked.pieces] == [3, 8 << 20, len(shared) - (8 << 20)]
    assert check_files(target, Record(JOB, (checked,), complete=True)) == []
    assert with_checksums(target, [checked]) == [checked]

    (target / "file").write_bytes(own + shared[:-1] + b"!")
    assert check_files(target, manifest) == []
    [fault] = check_files(target, manifest, source=source)
    assert fault[:3] == ("file", 3, len(shared))
    assert "not the bytes of file" in fault.problem
    [fault] = check_files(target, Record(JOB, (checked,), complete=True))
    assert fault.offset == 3 + (8 << 20)
    for problem, change in (
        ("ends at byte", lambda: (source / "file").write_bytes(b"head")),
        ("No such file", (source / "file").unlink),
    ):
        change()
        [fault] = check_files(target, manifest, source=source)
        assert problem in fault.problem
    (target / "file").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        with_checksums(target, [record])


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


# --- the record of an unfinished target ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record of all files, in the order of their work."""
    path = tmp_path / MANIFEST_FILE
    write_new_record(path, JOB, (), complete=False).replace(path)
    writer = RecordWriter(path)
    for name in CONTENT:
        writer.add(record(name))
    writer.close()
    with pytest.raises(OSError, match="closed"):
        writer.add(record("empty"))
    return path


def test_a_record_comes_back(path: Path) -> None:
    assert read_records(path.parent) == [Record(JOB, tuple(map(record, CONTENT)))]


def test_a_record_cut_anywhere_loses_at_most_the_torn_line(path: Path) -> None:
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        known = [Record(JOB, tuple(map(record, CONTENT))[: lines - 1])] if lines else []
        assert read_records(path.parent) == known


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b'{"name":"a.bin","nbytes":1}',
        b'{"name":"../a","nbytes":1,"pieces":[[1,1]]}',
        b'{"name":"a.bin","nbytes":-1,"pieces":[[-1,1]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[[1,4294967296]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[[1,true]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[[1,0,"../b"]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[[1,-1,"b"]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[[1,0,"b",2]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[[1]]}',
        b'{"name":"a.bin","nbytes":1,"pieces":[7]}',
    ],
    ids=[
        "zeros",
        "no checksum",
        "a file outside",
        "a negative size",
        "a checksum of 33 bits",
        "a checksum that is no number",
        "blocks of a file outside",
        "blocks before a file",
        "four numbers",
        "one number",
        "no range",
    ],
)
def test_nothing_behind_a_damaged_line_is_believed(path: Path, line: bytes) -> None:
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert read_records(path.parent) == [Record(JOB, (record("a.bin"),))]


def test_a_full_disk_tears_at_most_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, before = os.write, read_records(path.parent)
    writer = RecordWriter(path)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with pytest.raises(OSError, match="No space left"):
        writer.add(record("a.bin"))
    monkeypatch.undo()
    with pytest.raises(OSError, match="closed"):
        writer.add(record("a.bin"))
    assert read_records(path.parent) == before


def test_threads_do_not_tear_each_others_lines(path: Path) -> None:
    writer = RecordWriter(path)

    def write(thread: int) -> None:
        for number in range(200):
            writer.add(FileRecord(f"file-{thread}-{number}", (CheckedRange(1, number),)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    [known] = read_records(path.parent)
    assert len(known.files) == 803


# --- the job ---


def test_what_makes_a_job_another_one() -> None:
    assert Job.from_json(json.loads(json.dumps(JOB.to_json()))).differences(JOB) == []
    changed = Fingerprint((SourceFile("config.json", 13, 34, "ab"), SOURCE.files[1]))
    cases = {
        "command: was import, now export": replace(JOB, command="export"),
        "megatron-bridge: was 1.2, now 1.3": replace(JOB, package="1.3"),
        "option experts: was not given, now 'fused'": replace(
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
