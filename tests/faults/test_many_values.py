"""JSON of a few megabytes that would take gigabytes as values: refused before it does."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.errors import BridgeError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.safetensors_header import read_header
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE
from megatron.bridge.target.record import MANIFEST_FILE, read_manifest, read_records
from model_folders import safetensors_bytes
from unfinished_target import JOB, killed


def many(value: bytes, megabytes: int = 52) -> bytes:
    """An object with an array of nothing but such values."""
    count = (megabytes << 20) // (len(value) + 1)
    return b'{"a":[' + (value + b",") * count + value + b"]}"


def header(folder: Path, text: bytes) -> object:
    (folder / "model.safetensors").write_bytes(safetensors_bytes(text, b""))
    return read_header(folder / "model.safetensors")


def index(folder: Path, text: bytes) -> object:
    (folder / INDEX_FILE).write_bytes(text)
    return TensorIndex.from_folder(folder)


def config(folder: Path, text: bytes) -> object:
    (folder / "config.json").write_bytes(text)
    return HFConfig.from_file(folder)


def manifest(folder: Path, text: bytes) -> object:
    (folder / MANIFEST_FILE).write_bytes(text)
    return read_manifest(folder)


def in_little_memory(read: Callable[[Path, bytes], object], folder: Path, text: bytes) -> str:
    """What is raised where only 300 MB can be had, by a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), most))
        try:
            read(folder, text)
        except (BridgeError, MemoryError) as error:
            os.write(writer, f"{type(error).__name__}: {error}"[-2000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        message = said.read()
    os.waitpid(child, 0)
    return message


@pytest.mark.parametrize(
    ("read", "value"),
    [(header, value) for value in (b"[]", b"{}", b"1", b'""', b'{"a":0}')]
    + [(index, b"1"), (manifest, b"{}")],
)
def test_refused_before_it_is_read(
    read: Callable[[Path, bytes], object], value: bytes, tmp_path: Path
) -> None:
    said = in_little_memory(read, tmp_path, many(value))
    assert said.startswith("CheckpointError: ")
    assert " values, the limit is " in said


def test_the_largest_honest_header_is_read() -> None:
    from megatron.bridge.models.hf_pretrained.strict_json import MAX_MARKS

    entry = b'{"dtype":"BF16","shape":[512,1024,2,2],"data_offsets":[77777777777,77778826353]}'
    assert 250_000 * sum(map(entry.count, (b"[", b"{", b",", b":"))) < MAX_MARKS


def test_a_record_of_empty_lines(tmp_path: Path) -> None:
    """The line that is none ends it: those behind are never looked at."""
    killed(tmp_path / "out")
    path = tmp_path / "out.partial" / MANIFEST_FILE
    known = read_records(path.parent)
    with path.open("ab") as file:
        file.write(b"\n" * (1 << 20))
    [found] = read_records(path.parent)
    assert [found] == known
    assert found.job == JOB
    assert len(found.files) == 2
    path.write_bytes(many(b"[]", 17) + b"\n")
    assert read_records(path.parent) == []


def test_a_number_with_too_many_digits(tmp_path: Path) -> None:
    for digits, text in ((5000, b"7" * 5000), (4301, b"-" + b"7" * 4300)):
        with pytest.raises(ValueError, match=f"too many digits: {digits:,}") as error:
            parse_object(b'{"a":' + text + b"}")
        assert "set_int_max_str_digits" not in str(error.value)
        with pytest.raises(BridgeError, match="too many digits"):
            config(tmp_path, b'{"model_type":' + text + b"}")
    assert parse_object(b'{"a":' + b"7" * 400 + b"}") == {"a": int("7" * 400)}
