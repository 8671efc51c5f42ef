"""Conversions that are killed at any moment, and go on where they were."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked import processes
from megatron.bridge.synthetic import make_model
from slow_conversion import convert, convert_slowly

SETTINGS = {"num_shards": 3, "text.num_hidden_layers": 7, "text.vocab_size": 4001}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `hf` and `megatron`; `import` and `export` are what is to come out."""
    folder = tmp_path_factory.mktemp("killed")
    make_model("qwen3-vl-moe", folder / "hf", SETTINGS, seed=21)
    convert("import", folder, folder / "megatron")
    for direction in ("import", "export"):
        convert(direction, folder, folder / direction)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def recorded(partial: Path) -> Iterator[int]:
    """Bytes of each piece that the journals say is finished."""
    for journal in (partial / ".megatron-bridge").glob("*.jsonl"):
        for line in journal.read_bytes().splitlines()[1:]:
            yield json.loads(line)["nbytes"]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_five_times(direction: str, folder: Path, tmp_path: Path) -> None:
    """Each run is killed when it has recorded a random number of pieces; each goes on."""
    chance = random.Random(direction)
    expected = files_of(folder / direction)
    manifest = json.loads(expected[".megatron-bridge.json"])
    pieces = sum(len(file["pieces"]) for file in manifest["files"])
    total = sum(map(len, expected.values())) - len(expected[".megatron-bridge.json"])
    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        partial = out.with_name(out.name + ".partial")
        killed_at = kill(direction, folder, out, chance.randrange(1, pieces - 10))
        assert not out.exists()
        done_before = sum(recorded(partial))
        assert killed_at <= done_before < total
        done = convert(direction, folder, out, resume=True).written
        assert done.resumed_bytes == done_before
        assert done.resumed_bytes + done.written_bytes == total
        assert files_of(out) == expected
        assert not partial.exists()


def kill(direction: str, folder: Path, out: Path, pieces: int) -> int:
    """Kill a run that has recorded so many pieces; the bytes that they have."""
    partial = out.with_name(out.name + ".partial")
    process = processes.Process(target=convert_slowly, args=(direction, folder, out))
    process.start()
    assert process.pid is not None
    while process.is_alive():
        journal = next((partial / ".megatron-bridge").glob("process-*.jsonl"), None)
        if journal is not None and journal.read_bytes().count(b"\n") > pieces:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        time.sleep(0.001)
    assert process.exitcode == -signal.SIGKILL
    return sum(recorded(partial))
