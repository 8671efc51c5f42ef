"""Checkpoints of strangers: nothing of theirs runs, and they cost little time and memory.

Damage to an otherwise honest index, and to the data, is in test_torch_dist.py.
"""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
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

from megatron.bridge.cli import main
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.torch_dist import plain_pickle
from megatron.bridge.formats.torch_dist.metadata import MAX_AXES, read_metadata
from megatron.bridge.formats.torch_dist.plain_pickle import read_plain_pickle
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.tensors.boxes import tiling_faults
from refusals import NOWHERE, export_refused, paths_below, refused

ITERATION = "iter_0000000"
ESCAPE = "\x1b[2J\x07\nerror: forged"
CLASSES = "torch.distributed.checkpoint.metadata"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        TorchDistCheckpoint(folder)
    return str(error.value)


# --- pickles that run code ---

RAN: list[object] = []
"""What the pickles below would append to."""


def ran(*what: object) -> None:
    RAN.append(what)


class Stateful:
    """Runs code when its state is set, and when it is made."""

    def __init__(self, *what: object) -> None:
        ran("made", *what)

    def __new__(cls, *what: object, **more: object) -> Stateful:
        ran("new", *what, *more)
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        ran("state", state)


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


def name(module: str, word: str) -> bytes:
    """The operations that put a global on the stack, in the newer form."""
    return text(module) + text(word) + b"\x93"


HERE = "hostile_pickles"
CLASS = f"c{HERE}\nStateful\n".encode()
FUNCTION = f"c{HERE}\nran\n".encode()

CODE: dict[str, tuple[bytes, str]] = {
    "a call of protocol 0": (FUNCTION + b"(tR.", "hostile_pickles.ran"),
    "a call": (name(HERE, "ran") + b")R.", "hostile_pickles.ran"),
    "a call of what is in a list": (b"](" + name(HERE, "ran") + b")Re.", "hostile_pickles.ran"),
    "an instance": (f"(i{HERE}\nStateful\n.".encode(), "INST"),
    "an object": (b"(" + CLASS + b"o.", "hostile_pickles.Stateful"),
    "a new object": (CLASS + b")\x81.", "hostile_pickles.Stateful"),
    "a new object with keywords": (CLASS + b")}\x92.", "hostile_pickles.Stateful"),
    "a state": (CLASS + b")\x81}b.", "hostile_pickles.Stateful"),
    "an extension": (b"\x82\xf0)R.", "EXT1"),
    "an extension of two bytes": (b"\x83\xf0\x00)R.", "EXT2"),
    "an extension of four bytes": (b"\x84\xf0\x00\x00\x00)R.", "EXT4"),
    "a function of a class that is needed": (
        name(CLASSES, "Metadata.__init__.__globals__") + b".", "Metadata.__init__.__globals__"
    ),
    "a name that is put together": (
        text("os") + text("system") + b"\x93" + text("true") + b"\x85R.", "os.system"
    ),
    "builtins": (b"cbuiltins\neval\n" + text("1") + b"\x85R.", "builtins.eval"),
    "builtins of Python 2": (b"c__builtin__\neval\n" + text("1") + b"\x85R.", "__builtin__.eval"),
    "a persistent id": (b"P1\n.", "PERSID"),
    "a persistent object": (text("1") + b"Q.", "BINPERSID"),
    "a buffer": (b"\x97.", "NEXT_BUFFER"),
    "bytes that are code": (b"C\x01\x00.", "SHORT_BINBYTES"),
    "attributes of a class": (
        name(CLASSES, "Metadata") + b"N}" + text("polluted") + text("yes") + b"s\x86b.",
        "sets the state of what is no new object",
    ),
    "attributes of a function": (
        name("torch.serialization", "_get_layout") + b"}" + text("polluted") + text("x") + b"sb.",
        "new object",
    ),
    "a call of a result": (
        name("builtins", "set") + b")R" + b")R.", "calls what is no name"
    ),
}  # fmt: skip


@pytest.fixture
def hostile_pickles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of that name, which the pickles can import, and an extension that calls it."""
    import sys
    import types

    module = types.ModuleType(HERE)
    module.ran, module.Stateful = ran, Stateful  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, HERE, module)
    copyreg.add_extension(HERE, "ran", 0xF0)
    RAN.clear()
    yield
    copyreg.remove_extension(HERE, "ran", 0xF0)


@pytest.mark.parametrize("case", CODE)
def test_code(case: str, tmp_path: Path, hostile_pickles: None) -> None:
    program, said = CODE[case]
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + program)
    assert said in refusal(tmp_path)
    assert RAN == []
    assert not hasattr(Metadata, "polluted")


RUNNING = [
    case for case, (program, _) in CODE.items() if HERE.encode() in program or b"\xf0" in program
]


@pytest.mark.parametrize("case", RUNNING)
def test_code_would_run(case: str, hostile_pickles: None) -> None:
    """So the refusal of it says something."""
    pickle.loads(b"\x80\x04" + CODE[case][0])
    assert RAN


def test_classes_would_be_changed() -> None:
    """Even by an unpickler that is restricted to the names of an index."""
    pickle.loads(CODE["attributes of a class"][0])
    assert Metadata.polluted == "yes"  # type: ignore[attr-defined]
    del Metadata.polluted  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", ["a call", "an extension", "a state", "a persistent object"])
@pytest.mark.parametrize("command", ["export", "verify", "inspect", "plan"])
def test_code_on_the_command_line(
    case: str,
    command: str,
    small_model: Path,
    checkpoint: Path,
    hostile_pickles: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, said = CODE[case]
    (checkpoint / ITERATION / ".metadata").write_bytes(b"\x80\x04" + program)
    before = paths_below(checkpoint.parent)
    rest: dict[str, list[str | Path]] = {
        "export": [NOWHERE, "--hf", small_model],
        "verify": [small_model],
    }
    message = refused(capsys, command, checkpoint, *rest.get(command, []))
    assert said in message
    assert ".metadata: damaged or unsafe, refused to read it" in message
    assert paths_below(checkpoint.parent) == before
    assert RAN == []


# --- pickles that take all time or memory ---

DOUBLED = b")" + b"2\x86" * 60
"""A tuple of two tuples of two tuples: 120 bytes, and 2**60 leaves to whoever looks at them."""

DOUBLED_BY_MEMO = b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))

BOMBS: dict[str, tuple[bytes, str]] = {
    "a far place in the memo": (b"Nr\xff\xff\xff\x7f.", "not the index"),
    "a text of 4 GiB": (b"X\xff\xff\xff\xff.", "damaged"),
    "a text of 2**63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "BINUNICODE8"),
    "bytes of 2**63": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "BINBYTES8"),
    "a byte array of 2**63": (b"\x96" + b"\xff" * 7 + b"\x7f.", "BYTEARRAY8"),
    "a frame of 2**64": (b"\x95" + b"\xff" * 8 + b"N.", "not the index"),
    "an integer of 2 GiB": (b"\x8b\xff\xff\xff\x7f.", "LONG4"),
    "an integer in digits": (b"I" + b"9" * 100_000 + b"\n.", "INT"),
    "a key that takes forever to hash": (b"}" + DOUBLED + b"Ns.", "DUP"),
    "the same by memo": (
        b"}" + DOUBLED_BY_MEMO + b"Ns.",
        "a dict has a key of type tuple",
    ),
    "the same in a set": (
        b"\x8f(" + DOUBLED_BY_MEMO + b"\x90.",
        "not the index",
    ),
    "integers of one hash": (
        b"}(" + b"".join(
            b"\x8a\x0a" + (n * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for n in range(1, 50)
        ) + b"u.",
        "a dict has a key of type int",
    ),
    "a million marks": (b"(" * 1_000_000 + b".", "nested too deeply"),
    "many lists in each other": (b"]" * 200_000 + b"a" * 199_999 + b".", "not the index"),
    "many tuples in each other": (b")" + b"\x85" * 200_000 + b".", "not the index"),
    "many states in each other": (
        b"".join(name("builtins", "set") + b")R" for _ in range(50_000)) + b"b" * 49_999 + b".",
        "not the index",
    ),
    "a list in itself": (b"]q\x00h\x00a.", "not the index"),
    "no end": (b"N" * 200_000, "damaged"),
    "nothing": (b"", "damaged"),
    "an end before all": (b".", "damaged"),
    "a memo that is empty": (b"h\x05.", "damaged"),
    "another protocol": (b"\x80\x09N.", "protocol 9"),
    "no UTF-8": (b"\x8c\x02\xff\xfe.", "damaged"),
    "half of a surrogate pair": (b"\x8c\x03\xed\xa0\x80.", "not the index"),
    "an unknown operation": (b"\xfe.", "byte 0xfe"),
    "a key twice": (b"}" + (text("a") + b"Ns") * 2 + b".", "has the key 'a' twice"),
    "an odd number of entries": (b"}(" + text("a") + b"u.", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case: str, tmp_path: Path) -> None:
    program, said = BOMBS[case]
    (tmp_path / ".metadata").write_bytes(program)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read_metadata(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said in str(error.value)
    assert len(str(error.value)) < 2000
    assert peak < 1_000_000 + 200 * len(program)


def test_more_objects_than_any_index_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte makes an object of 56, and a file may have 256 MiB."""
    (tmp_path / ".metadata").write_bytes(b"]" * 1000 + b".")
    assert "not the index" in refusal(tmp_path)
    monkeypatch.setattr(plain_pickle, "MAX_OPERATIONS", 1000)
    assert "its pickle has more than 1000 operations" in refusal(tmp_path)


def test_lists_that_are_shared_a_thousand_times(tmp_path: Path) -> None:
    """A thousand tensors with the same thousand chunks: each chunk needs data of its own."""
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([1000]), [])
    entry.chunks = [ChunkStorageMetadata(torch.Size([n]), torch.Size([1])) for n in range(1000)]
    entries = {f"x{n}": entry for n in range(1000)}
    places = {MetadataIndex("x0", torch.Size([n])): _StorageInfo("a", 0, 8) for n in range(1000)}
    write(tmp_path, Metadata(entries, storage_data=places))
    assert "x1: no data stored for [0:1]" in refusal(tmp_path)


@pytest.mark.parametrize(
    "kind", ["a folder", "a pipe", "a device", "a terabyte", "a dangling link"]
)
def test_what_is_no_file(
    kind: str, small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / ITERATION / ".metadata"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a terabyte":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else "gone")
    said = "the limit is 268435456" if kind == "a terabyte" else "which holds no .metadata"
    assert said in export_refused(checkpoint, small_model, capsys)


# --- an index of the right types, whose values are hostile ---


def write(folder: Path, metadata: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def index(
    shape: tuple[int, ...] = (4, 6),
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    key: str = "w",
    **place: Any,
) -> Metadata:
    """Of one tensor, by default in one chunk; `place` is where its data lie."""
    chunks = [((0,) * len(shape), shape)] if chunks is None else chunks
    entry = TensorStorageMetadata(
        TensorProperties(),
        torch.Size(shape),
        [ChunkStorageMetadata(torch.Size(a), torch.Size(n)) for a, n in chunks],
    )
    info = {"relative_path": "__0_0.distcp", "offset": 0, "length": 200} | place
    places = {MetadataIndex(key, torch.Size(a)): _StorageInfo(**info) for a, _ in chunks}
    return Metadata({key: entry}, storage_data=places)


def with_size(*numbers: object) -> Metadata:
    """An index with a size that torch.Size itself would not take."""
    metadata = index()

    class Size:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.Size, (numbers,)

    metadata.state_dict_metadata["w"].size = Size()
    return metadata


def with_dtype(dtype: object) -> Metadata:
    metadata = index()
    metadata.state_dict_metadata["w"].properties = TensorProperties(dtype=dtype)
    return metadata


def two_places_for_one_chunk() -> Metadata:
    metadata = index()
    metadata.storage_data[Twin("w", torch.Size([0, 0]))] = _StorageInfo("__0_0.distcp", 0, 200)
    return metadata


class Twin(MetadataIndex):
    """Equal to another index, and not taken for it by a dict that is pickled."""

    def __hash__(self) -> int:
        return 1

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (MetadataIndex,), vars(self)


VALUES: dict[str, tuple[Callable[[], Metadata], str]] = {
    "a negative size": (lambda: with_size(-4, 6), "-4 where a size or an offset should be"),
    "a true size": (lambda: with_size(True, 6), "True where a size or an offset should be"),
    "a size of 2**63": (lambda: with_size(1 << 63, 6), "where a size or an offset should be"),
    "a size in words": (lambda: with_size("4", 6), "'4' where a size or an offset should be"),
    "a size of tuples": (lambda: with_size((4,), (6,)), "where a size or an offset should be"),
    "a million axes": (lambda: with_size(*[1] * 1_000_000), f"more than {MAX_AXES} axes"),
    "sizes of 2**62": (lambda: index((1 << 62, 3)), "w: __0_0.distcp is missing"),
    "overlapping chunks": (
        lambda: index(chunks=[((0, 0), (3, 6)), ((2, 0), (2, 6))]),
        "w: [2:3, 0:6] is filled 2 times",
    ),
    "a hole": (lambda: index(chunks=[((0, 0), (3, 6))]), "w: [3:4, 0:6] is not filled"),
    "no chunks": (lambda: index(chunks=[]), "w: [0:4, 0:6] is not filled"),
    "a chunk that sticks out": (lambda: index(chunks=[((0, 0), (5, 6))]), "sticks out of shape"),
    "an empty chunk": (
        lambda: index(chunks=[((0, 0), (4, 6)), ((1, 1), (0, 0))]), "is empty or sticks out"
    ),
    "a chunk of other axes": (lambda: index(chunks=[((0,), (24,))]), "a chunk has other axes"),
    "the same chunk twice": (
        lambda: index(chunks=[((0, 0), (4, 6)), ((0, 0), (4, 6))]), "w: no data stored for"
    ),
    "a negative offset": (lambda: index(offset=-1), "-1 where a size or an offset should be"),
    "an offset of 2**62": (lambda: index(offset=1 << 62), "is missing"),
    "a length of 2**64": (lambda: index(length=1 << 64), "where a size or an offset should be"),
    "a true length": (lambda: index(length=True), "True where a size or an offset should be"),
    "data above": (lambda: index(relative_path=".."), "w: .. is missing"),
    "data in the folder itself": (lambda: index(relative_path="."), "'.'"),
    "data without a name": (lambda: index(relative_path=""), "w:"),
    "data in a NUL": (lambda: index(relative_path="\0"), r"'\x00' where the name"),
    "data in bytes": (lambda: index(relative_path=b"a"), "refused to read it"),
    "data in a name that the terminal obeys": (
        lambda: index(relative_path=ESCAPE), r"'\x1b[2J\x07\nerror: forged' where the name"
    ),
    "a key that the terminal obeys": (lambda: index(key=ESCAPE), r"'\x1b[2J\x07\nerror: forged'"),
    "a key of a megabyte": (lambda: index(key="x" * 1_000_000), "where the name of a tensor"),
    "a dtype that is none here": (lambda: with_dtype(torch.qint8), "torch.qint8"),
    "a dtype of half a byte": (lambda: with_dtype(torch.complex32), "torch.complex32"),
    "a dtype that is no dtype": (lambda: with_dtype(torch.Size), "its dtype is none"),
    "a dtype in words": (lambda: with_dtype("bfloat16"), "its dtype is none"),
    "compressed data": (lambda: index(transform_descriptors=["zstd"]), "w: stored compressed"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str, tmp_path: Path) -> None:
    make, said = VALUES[case]
    write(tmp_path, make())
    message = refusal(tmp_path)
    assert said in message
    assert len(message) < 5000
    assert message.isprintable() or message.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "case", ["sizes of 2**62", "overlapping chunks", "a hole", "a dtype in words"]
)
def test_values_on_the_command_line(
    case: str, small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(checkpoint / ITERATION, VALUES[case][0]())
    message = export_refused(checkpoint, small_model, capsys)
    assert "w: " in message
    assert len(message.splitlines()) <= 6


def test_many_faults_are_a_short_message(
    small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The document by --json has every one."""
    keys = [f"w{chr(ord('a') + n)}" for n in range(20)]
    holes = [index(chunks=[((0, 0), (3, 6))], key=key) for key in keys]
    metadata = Metadata(
        {key: hole.state_dict_metadata[key] for key, hole in zip(keys, holes, strict=True)}
    )
    metadata.storage_data = {place: at for hole in holes for place, at in hole.storage_data.items()}
    write(checkpoint / ITERATION, metadata)
    message = export_refused(checkpoint, small_model, capsys)
    assert len(message.splitlines()) <= 6
    assert "wa: [3:4, 0:6] is not filled" in message
    assert main(["inspect", str(checkpoint), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert {problem.partition(":")[0] for problem in problems} == set(keys)


def test_a_checkpoint_of_nothing(
    small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(checkpoint / ITERATION, Metadata({}, storage_data={}))
    assert "it holds no weights of a model" in export_refused(checkpoint, small_model, capsys)
    reference = checkpoint.parent / "reference"
    reference.mkdir()
    shutil.copy(small_model / "config.json", reference)
    assert "it holds no weights of a model" in export_refused(checkpoint, reference, capsys)
    assert "it holds no weights of a model" in refused(capsys, "plan", checkpoint)


def test_chunks_that_are_no_grid() -> None:
    """Told in time linear in their number; cutting along every bound would take 10**10 steps."""
    count = 30_000
    chunks = [
        box
        for column in range(count)
        for box in (
            ((0, column + 1), (column, column + 1)),
            ((column + 1, count + 1), (column, column + 1)),
        )
    ]
    assert list(tiling_faults((count + 1, count), chunks)) == []
    [fault] = tiling_faults((count + 1, count), chunks[:-1])
    assert fault == f"[{count}:{count + 1}, {count - 1}:{count}] is not filled"


def test_an_honest_pickle_is_read_as_plain_data() -> None:
    names = {(type(value).__module__, type(value).__name__) for value in (Metadata, )} | {
        (CLASSES, "BytesStorageMetadata"), ("builtins", "set")
    }  # fmt: skip
    value = {"a": [1, -1, 1 << 40, -(1 << 70), None, True, False, "ü", (), (1,), (1, 2), (1, 2, 3)],
             "b": {"c": tuple(range(300))}}  # fmt: skip
    for protocol in (2, 3, 4, 5):
        assert read_plain_pickle(pickle.dumps(value, protocol), names, "index") == value
    call = read_plain_pickle(pickle.dumps(BytesStorageMetadata(), 4), names, "index")
    assert call.callee.name == "BytesStorageMetadata"  # type: ignore[union-attr]
    assert read_plain_pickle(pickle.dumps({"x"}, 4), names, "index") == ["x"]
