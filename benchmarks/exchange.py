"""Weights between ranks: a refit beside other ways to move the same, on four processes.

    python -m benchmarks --case exchange [--rounds 5]

All processes do one way at a time, in an order that changes from round to round. The time of a way
is that of the slowest rank; what counts are ratios of the same round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.cases import EXCHANGE_MODEL, Case, reduced
from benchmarks.figures import Spread
from benchmarks.goals import Goal
from benchmarks.model_files import ModelFiles
from benchmarks.processes import BenchmarkError

FLOOR, MEMCPY = "the same messages, nothing packed", "a copy of the same bytes"
REFIT, DELTA = "refit", "refit of changes"
GATHERS, RESHARDING = "every tensor to every rank", "megatron-core's resharding"
WAYS = (FLOOR, MEMCPY, REFIT, DELTA, RESHARDING, GATHERS)

WORLD = 4

SHARE = 0.03
"""Of the values, that change before a refit of changes."""

_WINDOW_BYTES, _TINY_WINDOW_BYTES = 64 << 20, 1 << 16
_TO_FLOOR, _OF_GATHERS, _WINDOWS, _OF_CHANGES = 1.5, 5, 4, 1.2
_CHANGED_WORD_BYTES = 3
"""Two, and the least that says where they go."""

_MIB = 2**20


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured.

    seconds: of each way, round by round. sent_bytes, collectives: of a way, once. buffer_bytes:
    beside model and targets. prepare_seconds: that the refit took to make. wrong: how many
    tensors had other values than the trainer's, by way.
    """

    seconds: Mapping[str, list[float]]
    sent_bytes: Mapping[str, int]
    collectives: Mapping[str, int]
    buffer_bytes: Mapping[str, int]
    prepare_seconds: float
    wrong: Mapping[str, int]


@dataclass(frozen=True)
class ExchangeResults:
    """One run.

    model, nbytes: what was moved. ranks: what each measured. The rest is as of figures.Results.
    """

    command: str
    measured: str
    host: Mapping[str, str]
    model: str
    nbytes: int
    window_bytes: int
    ranks: Sequence[RankFigures]

    @property
    def rounds(self) -> int:
        """Those that counted."""
        return len(self.ranks[0].seconds[REFIT])

    def seconds(self, way: str) -> list[float]:
        """Of the slowest rank, round by round."""
        return [max(times) for times in zip(*(one.seconds[way] for one in self.ranks), strict=True)]

    def ratio(self, way: str, other: str) -> Spread:
        """The time of one way as a multiple of that of another, of the same round."""
        pairs = zip(self.seconds(way), self.seconds(other), strict=True)
        return Spread.of([one / of for one, of in pairs])

    def sent_bytes(self, way: str) -> int | None:
        """By all ranks together."""
        sent = [one.sent_bytes.get(way) for one in self.ranks]
        return sum(filter(None, sent)) if any(sent) else None

    @property
    def to_changes(self) -> float:
        """What a refit of changes sent, as a multiple of the least that says what changed."""
        changed = SHARE * (self.sent_bytes(REFIT) or 0) / 2
        return (self.sent_bytes(DELTA) or 0) / (changed * _CHANGED_WORD_BYTES)

    @property
    def to_window(self) -> float:
        """Memory that a refit takes beside model and targets, in windows; of the rank with most."""
        return max(one.buffer_bytes[REFIT] for one in self.ranks) / self.window_bytes

    def document(self) -> dict[str, Any]:
        """As JSON."""
        ratios = {way: asdict(self.ratio(way, FLOOR)) for way in WAYS}
        return asdict(self) | {
            "figures": {
                "to_floor": ratios,
                "gathers_to_refit": asdict(self.ratio(GATHERS, REFIT)),
                "to_changes": self.to_changes,
                "to_window": self.to_window,
            }
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The results that a document holds."""
        values = {key: value for key, value in document.items() if key != "figures"}
        return cls(**{**values, "ranks": [RankFigures(**one) for one in values["ranks"]]})

    def wrong(self, way: str) -> int:
        """How many tensors a way left wrong, on all ranks."""
        return sum(one.wrong.get(way, 0) for one in self.ranks)


def exchange_case(layers: int | None, *, tiny: bool) -> Case:
    """The model that is moved: with a layer for each pipeline stage, at least."""
    if layers is not None or tiny:
        layers = max(2, layers or 0)
    return reduced(EXCHANGE_MODEL, layers, tiny=tiny)


def measure_exchange(
    folder: Path, case: Case, rounds: int, about: Mapping[str, Any], *, tiny: bool
) -> ExchangeResults:
    """Make the model, and move it.

    Args:
        folder: for its files, which are removed.
        case: of `exchange_case`.
        rounds: that count.
        about: command, date and host.
        tiny: with windows of as little.

    Raises:
        BenchmarkError: a process failed, or a refit moved something wrong.
    """
    window_bytes = _TINY_WINDOW_BYTES if tiny else _WINDOW_BYTES
    files = ModelFiles(case, folder)
    try:
        files.make()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(WORLD), "-m", "benchmarks.exchange_ranks"]
        command += [str(files.folder), str(folder), str(window_bytes), str(rounds), str(SHARE)]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            first = done.stderr.find("Traceback")  # what follows is torchrun's, of the others
            raise BenchmarkError(
                f"the processes of the exchange failed:\n{done.stderr[max(first, 0) :][:4000]}"
            )
        ranks = [
            RankFigures(**json.loads((folder / f"found{rank}.json").read_text("utf-8")))
            for rank in range(WORLD)
        ]
    finally:
        files.remove()
    results = ExchangeResults(
        **about,
        model=case.title,
        nbytes=files.nbytes,
        window_bytes=window_bytes,
        ranks=ranks,
    )
    for way in (REFIT, DELTA):
        if results.wrong(way):
            raise BenchmarkError(f"{way}: {results.wrong(way)} targets have other values")
    return results


def exchange_goals(results: ExchangeResults) -> Iterator[Goal]:
    """What the figures are compared with."""
    to_floor = results.ratio(REFIT, FLOOR).median
    yield Goal(
        f"{REFIT}: time, beside {FLOOR}",
        f"at most {_TO_FLOOR}",
        f"{to_floor:.2f}",
        to_floor <= _TO_FLOOR,
    )
    of_gathers = results.ratio(GATHERS, REFIT).median
    yield Goal(
        f"{GATHERS}: time, beside {REFIT}",
        f"at least {_OF_GATHERS}",
        f"{of_gathers:.2f}",
        of_gathers >= _OF_GATHERS,
    )
    yield Goal(
        f"{REFIT}: memory beside model and targets, in windows of {_mib(results.window_bytes)}",
        f"at most {_WINDOWS}",
        f"{results.to_window:.2f}",
        results.to_window <= _WINDOWS,
    )
    yield Goal(
        f"{DELTA}, {SHARE:.0%} of the values: bytes sent, beside {_CHANGED_WORD_BYTES} for each "
        f"that changed",
        f"at most {_OF_CHANGES}",
        f"{results.to_changes:.2f}",
        results.to_changes <= _OF_CHANGES,
    )


def rows(results: ExchangeResults) -> Iterator[list[str]]:
    """Of the table of all ways."""
    for way in WAYS:
        sent, count = results.sent_bytes(way), results.ranks[0].collectives.get(way)
        buffers = max(one.buffer_bytes.get(way, 0) for one in results.ranks)
        wrong = results.wrong(way)
        yield [
            way + (f" ({wrong} tensors wrong)" if wrong else ""),
            "" if way == FLOOR else str(results.ratio(way, FLOOR)),
            str(Spread.of(results.seconds(way))),
            "" if sent is None else f"{sent / 1e9:.2f}",
            "" if count is None else str(count),
            _mib(buffers) if buffers else "",
        ]


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:.0f} MiB"
