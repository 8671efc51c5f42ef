"""Ctrl-C and SIGTERM at the end of a run: who is told "interrupted" finds no target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PREAMBLE = """
import os, signal, sys
from pathlib import Path
from signalled_commit import ends, signal_at_every_line
home, number = Path(sys.argv[1]), signal.Signals(int(sys.argv[2]))
os.fsync = lambda descriptor: None
"""

_LIBRARY = """
import unfinished_target as t
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.folder import ResumableFolder
t.convert(home / "out")
signal_at_every_line(ResumableFolder, "_complete", home, number, stride=11)

@done_means_done()
def run():
    with ResumableFolder(home / "out", t.JOB, t.SIZES, force=True, keep_manifest=False) as partial:
        t.complete(partial)
    return 0

ends(run)
"""

_STAGED = """
import megatron.bridge.target.staging as staging
with staging.staged_folder(home / "out") as folder:
    (folder / "config.json").write_text("old")

signal_at_every_line(staging, "publish", home, number, stride=3)

def run():
    with staging.staged_folder(home / "out", force=True) as folder:
        (folder / "config.json").write_text("newer")
    return 0

ends(run)
"""

_COMMAND = """
from megatron.bridge.target.folder import ResumableFolder
from megatron.bridge.cli import main
signal_at_every_line(ResumableFolder, "_complete", home, number, stride=193)
sys.argv = ["megatron-bridge", *sys.argv[3:]]
ends(main)
"""


def outcomes(program: str, home: Path, number: int, *args: str | Path) -> list[list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + program, str(home), str(number), *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(
    "number", [2, pytest.param(15, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_a_target_that_replaces_another(home: Path, number: int) -> None:
    *steps, (status, last, expected, _) = outcomes(_LIBRARY, home, number)
    assert (status, last) == (0, ["out"])
    assert ".megatron-bridge.jsonl" not in expected
    old = {**expected, ".megatron-bridge.jsonl": steps[0][2][".megatron-bridge.jsonl"]}
    done = [step for step in steps if step[2] == expected]
    not_done = [step for step in steps if step[2] != expected]
    assert len(done) >= 8
    assert steps == not_done + done
    for status, there, files, where in not_done:
        assert files == old, where
        assert there in (["out"], ["out", "out.partial"]), where
        assert status == (130 if number == 2 else -15), where
    for status, there, _, where in done:
        assert there == ["out"], where
        # Nobody handles SIGTERM here: it ends the process, when that is done.
        assert status == (0 if number == 2 else -15), where


@pytest.mark.parametrize(
    "number", [pytest.param(2, marks=pytest.mark.slow), 15], ids=["SIGINT", "SIGTERM"]
)
def test_a_folder_that_is_staged(home: Path, number: int) -> None:
    *steps, last = outcomes(_STAGED, home, number)
    assert last[:3] == [0, ["out"], {"config.json": 5}]
    done = [step for step in steps if step[2] == {"config.json": 5}]
    assert len(done) >= 8
    for status, there, files, where in steps:
        if number == 15:
            assert status == -15, where
        if status == 0:
            assert files == {"config.json": 5}, where
        if files == {"config.json": 3} and number == 2:
            assert status == 130, where
        if number == 2 or files == {"config.json": 5}:
            assert there == ["out"], where


@pytest.mark.parametrize(("command", "number"), [("import", 2), ("export", 15)])
def test_a_command(
    command: str, number: int, home: Path, small_model: Path, small_checkpoint: Path
) -> None:
    if command == "import":
        args = ["import", small_model, home / "out", "--json"]
    else:
        args = ["export", small_checkpoint, home / "out", "--hf", small_model, "--json"]
    *steps, (status, last, expected, _) = outcomes(_COMMAND, home, number, *args)
    assert (status, last) == (0, ["out"])
    assert (".megatron-bridge.jsonl" in expected) == (command == "import")
    done = [step for step in steps if step[0] == 0]
    not_done = [step for step in steps if step[0] != 0]
    assert len(done) > 5
    assert steps == not_done + done
    for _, there, files, where in done:
        assert there == ["out"], where
        assert files == expected, where
    for status, there, _, where in not_done:
        assert status == (130 if number == 2 else 143), where
        assert "out" not in there, where
