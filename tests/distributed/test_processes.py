"""Processes that share a conversion: one target, or none; an error of one is an error of all."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import forked
from megatron.bridge.errors import InputError
from megatron.bridge.target.checksums import check_files
from megatron.bridge.target.processes import Processes
from megatron.bridge.target.record import read_manifest
from shared_conversion import JOB, SIZES, convert, every_accident, nothing

SCRIPT = Path(__file__).parents[1] / "shared_conversion.py"
TOTAL = sum(SIZES.values())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every accident happened once, in three processes that one of them connects."""
    home = tmp_path_factory.mktemp("home")
    done = forked.run(every_accident, home)
    assert done.returncode == 0, done.stderr
    return home


def outcome(home: Path, name: str, rank: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((home / f"{name}.{rank}.json").read_text())
    return document


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    target = tmp_path_factory.mktemp("alone") / "out"
    convert(Processes(), target, nothing)
    return files_of(target)


def test_three_processes_write_what_one_does(home: Path, alone: dict[str, bytes]) -> None:
    outcomes = [outcome(home, "none", rank) for rank in range(3)]
    assert len({str(told["first"]) for told in outcomes}) == 1
    written = [told["done"][1] for told in outcomes]
    assert sum(written) == TOTAL
    assert max(written) < TOTAL / 2
    assert files_of(home / "none") == alone
    manifest = read_manifest(home / "none")
    assert manifest is not None
    assert manifest.job == JOB
    assert check_files(home / "none", manifest) == []


def test_the_first_names_all_that_failed(home: Path) -> None:
    first = outcome(home, "two fail", 0)
    assert first["error"] == "ProcessFailed"
    lines = first["message"].splitlines()
    assert lines[:2] == [f"process {rank} failed: shard {rank} cannot be read" for rank in (1, 2)]
    assert "two fail.partial; go on with --resume" in lines[2]
    for rank in (1, 2):
        assert outcome(home, "two fail", rank)["error"] == "CheckpointError"


def test_what_some_finished_others_take_over(home: Path, alone: dict[str, bytes]) -> None:
    """Three processes failed, two went on: nothing is written twice."""
    outcomes = [outcome(home, "resumed", rank)["done"] for rank in range(2)]
    resumed = {resumed for resumed, _ in outcomes}
    assert len(resumed) == 1
    assert resumed.pop() + sum(written for _, written in outcomes) == TOTAL
    assert outcomes[0][0] > 0
    assert files_of(home / "two fail") == alone


@pytest.mark.parametrize(
    ("name", "failed", "error", "message"),
    [
        ("the first fails", 0, "OSError", "No space left on device"),
        ("source changed", 1, "SourceChanged", "it changed"),
        ("before the start", 0, "CheckpointError", "config.json: the file is missing"),
        ("interrupted", 2, "KeyboardInterrupt", ""),
    ],
)
def test_an_error_of_one_is_told_to_all(
    home: Path, name: str, failed: int, error: str, message: str
) -> None:
    for rank in range(3):
        told = outcome(home, name, rank)
        assert message in told["message"]
        if name != "interrupted":
            assert told["status"] == 2
        assert told["error"] == (error if rank == failed else "ProcessFailed")
        if rank != failed:
            assert told["message"].startswith(f"process {failed} failed: ")


def test_only_what_can_go_on_is_kept(home: Path) -> None:
    names = {path.name for path in home.iterdir() if path.is_dir()}
    kept = {"the first fails", "killed", "the first is killed", "interrupted"}
    assert names == {"none", "two fail"} | {f"{name}.partial" for name in kept}


def test_a_killed_process_is_missed(home: Path) -> None:
    for name, others in (("killed", (0, 2)), ("the first is killed", (1, 2))):
        for rank in others:
            told = outcome(home, name, rank)
            assert told["error"] == "ProcessFailed"
            assert told["message"].startswith("another process ended without saying why")


def test_a_process_that_sees_another_source_is_refused(home: Path) -> None:
    told = outcome(home, "another job", 2)
    assert told["error"] == "InputError"
    assert "this process sees another conversion than process 0" in told["message"]
    assert "  - the layout of the output files" in told["message"]
    assert outcome(home, "another job", 0)["message"].startswith("process 2 failed: ")


# --- under torchrun ---


def torchrun(home: Path, name: str) -> subprocess.CompletedProcess[str]:
    return forked.torchrun(str(SCRIPT), str(home), name)


@pytest.mark.slow  # test_stock_load converts under torchrun too
def test_torchrun(tmp_path: Path, alone: dict[str, bytes]) -> None:
    done = torchrun(tmp_path, "none")
    assert done.returncode == 0, done.stderr
    assert sum(outcome(tmp_path, "none", rank)["done"][1] for rank in range(2)) == TOTAL
    assert files_of(tmp_path / "none") == alone


@pytest.mark.slow
def test_torchrun_ends_all_when_one_is_killed(tmp_path: Path, alone: dict[str, bytes]) -> None:
    done = torchrun(tmp_path, "killed")
    assert done.returncode != 0
    assert not (tmp_path / "killed").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["killed.partial"]  # no last words
    resumed, written = convert(Processes(), tmp_path / "killed", nothing, resume=True)
    assert resumed > 0
    assert resumed + written == TOTAL
    assert files_of(tmp_path / "killed") == alone


# --- one process ---


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Processes.from_environment() as processes:
        assert (processes.rank, processes.size, processes.is_first) == (0, 1, True)
        assert processes.own_files({"b": 3, "a": 2}) == ("b", "a")
        assert processes.run_on_first(lambda: [7]) == [7]
        assert processes.run_on_all(lambda: "done") == "done"


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        ("", "2", "RANK should be a number, found ''"),
        ("-1", "2", "RANK should be a number"),
        ("0", "two", "WORLD_SIZE should be a number, found 'two'"),
        ("3", "3", "RANK is 3, but WORLD_SIZE 3"),
    ],
)
def test_an_environment_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str, message: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=message):
        Processes.from_environment()


def test_shares_are_disjoint_complete_and_alike() -> None:
    sizes = {f"file-{number}": (7919 * number) % 1000 for number in range(40)}
    shares = []
    for rank in range(3):
        processes = Processes()
        processes.rank, processes.size = rank, 3
        shares.append(processes.own_files(sizes))
        assert processes.own_files(dict(reversed(sizes.items()))) == shares[-1][::-1]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) < 100
