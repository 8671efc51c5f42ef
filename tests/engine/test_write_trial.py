"""Past the cache or through it: the first pieces of a large output say which is better."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.engine import piece_writer, write_trial
from megatron.bridge.engine.pieces import Piece
from megatron.bridge.engine.write_trial import LEAST_OUTPUT, WriteTrial
from written_pieces import write_in_threads

PIECE = 8 << 20


def tried(past: float, through: float, pieces: int = 40) -> tuple[list[bool], list[bool]]:
    """Ways of the pieces on trial, and of the others, if a piece takes so long either way."""
    trial = WriteTrial(LEAST_OUTPUT)
    ways: tuple[list[bool], list[bool]] = ([], [])
    for _ in range(pieces):
        direct, measured = trial.way(PIECE)
        ways[not measured].append(direct)
        if measured:
            trial.note(direct, PIECE, past if direct else through)
    return ways


def test_the_way_that_wins_is_taken() -> None:
    on_trial, others = tried(past=2.0, through=1.0)
    assert on_trial == [True, False] * 8
    assert others == [False] * 24


def test_the_cache_has_to_win_clearly() -> None:
    on_trial, others = tried(past=1.1, through=1.0)
    assert on_trial == [True, False] * 8
    assert others == [True] * 24


def test_a_cache_that_is_far_behind_is_not_tried_for_long() -> None:
    on_trial, others = tried(past=1.0, through=2.0)
    assert on_trial == [True, False] * 2
    assert others == [True] * 36


def test_a_small_output_is_no_trial() -> None:
    assert WriteTrial(LEAST_OUTPUT - 1).way(PIECE) == (True, False)


def test_pieces_beyond_the_trial_do_not_wait_for_it() -> None:
    trial = WriteTrial(LEAST_OUTPUT)
    ways = [trial.way(PIECE) for _ in range(20)]
    assert ways == [(True, True), (False, True)] * 8 + [(True, False)] * 4
    for direct, measured in ways:
        if measured:
            trial.note(direct, PIECE, 2.0 if direct else 1.0)
    assert trial.way(PIECE) == (False, False)


def test_rates_are_of_bytes() -> None:
    """Twice as long for a piece of three times the length is faster."""
    trial = WriteTrial(LEAST_OUTPUT)
    for direct in [True, False] * 32:
        trial.note(direct, PIECE if direct else 3 * PIECE, 1.0 if direct else 2.0)
    assert trial.way(PIECE) == (False, False)


def test_a_way_that_is_not_there() -> None:
    trial = WriteTrial(LEAST_OUTPUT)
    assert trial.way(PIECE) == (True, True)
    trial.decide(direct=False)
    trial.note(direct=True, nbytes=PIECE, seconds=1.0)
    assert trial.way(PIECE) == (False, False)


# --- With files ----------------------------------------------------------------------------------

LONG = 96 << 10
COUNT = 60


@pytest.fixture
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_trial, "LEAST_OUTPUT", LONG)
    monkeypatch.setattr(write_trial, "_SHORTEST", 4 * LONG)
    monkeypatch.setattr(write_trial, "_LONGEST", 8 * LONG)
    monkeypatch.setattr(piece_writer, "_BEHIND", 5 * LONG)


def write_files(folder: Path) -> bytes:
    """Two files of unaligned pieces, by three threads; returns the content of both."""
    content = os.urandom(COUNT * LONG + 77)
    lengths = [LONG] * (COUNT - 1) + [LONG + 77]
    pieces = [
        Piece(name, sum(lengths[:number]), length, ())
        for name in ("one", "two")
        for number, length in enumerate(lengths)
    ]

    write_in_threads(folder, ("one", "two"), content, pieces, LONG)
    return content


@pytest.mark.usefixtures("small_trial")
@pytest.mark.parametrize("better", ["past", "through"])
def test_bytes_are_the_same_either_way(
    better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those behind the trial go the way that won it."""
    if not has_direct_writes(tmp_path):
        pytest.skip("the file system has no direct writes")
    calls = {"past": 0, "through": 0}

    def counted(name: str) -> Callable[..., object]:
        real = getattr(piece_writer, f"_write_{name}")

        def function(*arguments: object, **options: object) -> object:
            calls[name] += 1
            if name != better:
                threading.Event().wait(0.05)
            return real(*arguments, **options)

        return function

    for name in calls:
        monkeypatch.setattr(piece_writer, f"_write_{name}", counted(name))
    content = write_files(tmp_path)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == content
    assert sum(calls.values()) == 2 * COUNT
    assert calls[better] > 2 * COUNT - 25
    assert min(calls.values()) >= 4


@pytest.mark.usefixtures("small_trial")
def test_without_direct_writes_the_cache_is_emptied_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on its way stays below a bound, and nothing of a long file stays in the cache."""
    behind: list[tuple[str, int]] = []

    def noted(name: str) -> Callable[..., object]:
        real = getattr(piece_writer, name)

        def function(descriptor: int, offset: int = 0, nbytes: int = 0) -> object:
            behind.append((name, nbytes))
            return real(descriptor, offset, nbytes)

        return function

    for name in ("start_writing", "finish_writing", "forget"):
        monkeypatch.setattr(piece_writer, name, noted(name))
    monkeypatch.setattr(piece_writer, "_DIRECT", None)
    content = write_files(tmp_path)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == content
    begun = [nbytes for name, nbytes in behind if name == "start_writing"]
    ended = [nbytes for name, nbytes in behind if name == "finish_writing"]
    assert sum(begun) == 2 * len(content)
    assert sum(begun) - sum(ended) <= 2 * 5 * LONG
    assert behind.count(("forget", 0)) == 2


def has_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True
