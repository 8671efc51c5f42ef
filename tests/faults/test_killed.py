"""Conversions that are killed at any moment, and go on where they were."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from forked import processes
from megatron.bridge.synthetic import make_model
from slow_conversion import convert, convert_slowly

RECORD = ".megatron-bridge.jsonl"
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


def recorded(partial: Path) -> list[int]:
    """Bytes of each file that the record says is finished."""
    lines = (partial / RECORD).read_bytes().split(b"\n")[1:-1]
    return [json.loads(line)["nbytes"] for line in lines]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_five_times(direction: str, folder: Path, tmp_path: Path) -> None:
    """Each run is killed when it has recorded a random number of files; each goes on."""
    chance = random.Random(direction)
    expected = files_of(folder / direction)
    total = sum(map(len, expected.values())) - len(expected[RECORD])
    weights = sum(len(content) > 100_000 for content in expected.values())
    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        partial = out.with_name(out.name + ".partial")
        finished, later = chance.randrange(weights - 2), chance.random() / 50
        killed_at = kill(direction, folder, out, finished, later)
        assert not out.exists()
        done_before = sum(recorded(partial))
        assert killed_at <= done_before < total
        done = convert(direction, folder, out, resume=True).written
        assert done.resumed_bytes == done_before
        assert done.resumed_bytes + done.bytes == total
        assert files_of(out) == expected
        assert not partial.exists()


def kill(direction: str, folder: Path, out: Path, files: int, later: float) -> int:
    """Kill a run, so many seconds after it has recorded so many files; the bytes that it has."""
    partial = out.with_name(out.name + ".partial")
    process = processes.Process(target=convert_slowly, args=(direction, folder, out))
    process.start()
    assert process.pid is not None
    while process.is_alive():
        record = partial / RECORD
        if record.exists() and record.read_bytes().count(b"\n") > files:
            time.sleep(later)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        time.sleep(0.001)
    assert process.exitcode == -signal.SIGKILL
    return sum(recorded(partial))
