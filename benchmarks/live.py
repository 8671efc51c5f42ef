"""The live model: how long it takes to fill, and its passes beside those of transformers.

    python -m benchmarks --case live [--rounds 5]

Filling is a process of its own, beside one that only reads the files (`live_filling`); they take
turns. The passes of all families run in one process for each number of threads (`live_forward`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.cases import LIVE_MODEL, Case, reduced
from benchmarks.figures import Spread
from benchmarks.goals import Goal
from benchmarks.live_filling import FILL, READ
from benchmarks.model_files import ModelFiles
from benchmarks.processes import BenchmarkError, run
from benchmarks.rounds import SETTLE_SECONDS

THREADS = (1, 2)
STEPS = ("forward", "forward and backward")

_TO_READ, _ABOVE_MIB, _TO_TRANSFORMERS = 1.3, 64, 1.0
_MIB = 2**20


@dataclass(frozen=True)
class Filling:
    """One process: seconds of its work, bytes that it was to hold in the end, and the most it held.

    above_bytes: the most memory beyond what the interpreter and its imports held, and beyond
    nbytes.
    """

    seconds: float
    nbytes: int
    above_bytes: int


@dataclass(frozen=True)
class Passes:
    """Processor seconds of one step of a family, round by round."""

    family: str
    threads: int
    step: str
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratio(self) -> Spread:
        """Ours as a multiple of transformers', of the same round."""
        return Spread.of([one / of for one, of in zip(self.ours, self.theirs, strict=True)])


@dataclass(frozen=True)
class LiveResults:
    """One run.

    model: that was filled. filling: FILL and READ, round by round. The rest is as of
    figures.Results.
    """

    command: str
    measured: str
    host: Mapping[str, str]
    model: str
    filling: Mapping[str, Sequence[Filling]]
    passes: Sequence[Passes]

    @property
    def rounds(self) -> int:
        """Those that counted."""
        return len(self.filling[FILL])

    @property
    def to_read(self) -> Spread:
        """The time to fill the model as a multiple of that to read its files, of the same round."""
        pairs = zip(self.filling[FILL], self.filling[READ], strict=True)
        return Spread.of([one.seconds / of.seconds for one, of in pairs])

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {
            "figures": {
                "to_read": asdict(self.to_read),
                "to_transformers": [asdict(one.ratio) for one in self.passes],
            }
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The results that a document holds."""
        values = {key: value for key, value in document.items() if key != "figures"}
        values["filling"] = {
            what: [Filling(**one) for one in runs] for what, runs in values["filling"].items()
        }
        return cls(**{**values, "passes": [Passes(**one) for one in values["passes"]]})


def live_case(layers: int | None, *, tiny: bool) -> Case:
    """The model that is filled."""
    return reduced(LIVE_MODEL, layers, tiny=tiny)


def measure_live(
    folder: Path, case: Case, rounds: int, about: Mapping[str, Any], *, tiny: bool
) -> LiveResults:
    """Make the model, fill it, and run the passes.

    Args:
        folder: for its files, which are removed.
        case: of `live_case`.
        rounds: that count.
        about: command, date and host.
        tiny: passes of the first family only, on one thread.

    Raises:
        BenchmarkError: a process failed.
    """
    files = ModelFiles(case, folder)
    try:
        files.make()
        _filling(files.folder, READ)  # from here on the files lie in memory
        turns = [(READ, FILL) if number % 2 else (FILL, READ) for number in range(rounds)]
        found = [{what: _filling(files.folder, what) for what in both} for both in turns]
    finally:
        files.remove()
    passes = [
        one for threads in THREADS[: 1 if tiny else None] for one in _passes(threads, rounds, tiny)
    ]
    return LiveResults(
        **about,
        model=case.title,
        filling={what: [one[what] for one in found] for what in (FILL, READ)},
        passes=passes,
    )


def _filling(folder: Path, what: str) -> Filling:
    time.sleep(SETTLE_SECONDS)
    measured, document = run([sys.executable, "-m", "benchmarks.live_filling", str(folder), what])
    nbytes = document["nbytes"]
    above = measured.peak_bytes - measured.start_bytes - nbytes
    return Filling(measured.seconds, nbytes, max(0, above))


def _passes(threads: int, rounds: int, tiny: bool) -> list[Passes]:
    command = [sys.executable, "-m", "benchmarks.live_forward", "--json"]
    command += [f"--threads={threads}", f"--rounds={rounds}", *["--tiny"] * tiny]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"the passes failed:\n{done.stderr[-4000:]}")
    return [
        Passes(**{key: one[key] for key in ("family", "threads", "step", "ours", "theirs")})
        for one in json.loads(done.stdout)
    ]


def live_goals(results: LiveResults) -> Iterator[Goal]:
    """What the figures are compared with."""
    to_read = results.to_read.median
    yield Goal(
        f"{results.model}: time from the folder to a filled model, beside a read of its files",
        f"at most {_TO_READ}",
        f"{to_read:.2f}",
        to_read <= _TO_READ,
    )
    above = max(one.above_bytes for one in results.filling[FILL]) / _MIB
    yield Goal(
        f"{results.model}: memory above the interpreter's own and the model's",
        f"at most {_ABOVE_MIB} MiB",
        f"{above:.0f} MiB",
        above <= _ABOVE_MIB,
    )
    for one in results.passes:
        ratio = round(one.ratio.median, 2)
        yield Goal(
            f"{one.family}, {one.step}, {_threads(one.threads)}: processor time, beside "
            "transformers' with SDPA",
            f"at most {_TO_TRANSFORMERS:.2f}",
            f"{ratio:.2f}",
            ratio <= _TO_TRANSFORMERS,
        )


def pass_rows(results: LiveResults) -> Iterator[list[str]]:
    """Of the table of all passes."""
    for one in results.passes:
        ours, theirs = Spread.of(one.ours), Spread.of(one.theirs)
        yield [
            f"{one.family}, {one.step}",
            str(one.threads),
            str(one.ratio),
            f"{ours.median:.3f}",
            f"{theirs.median:.3f}",
        ]


def filling_rows(results: LiveResults) -> Iterator[list[str]]:
    """Of the table of the filling."""
    names = {FILL: "filled model", READ: "read of the files"}
    for what, runs in results.filling.items():
        seconds = Spread.of([one.seconds for one in runs])
        yield [
            names[what],
            str(results.to_read) if what == FILL else "",
            str(seconds),
            f"{runs[0].nbytes / seconds.median / 1e9:.2f}",
            f"{max(one.above_bytes for one in runs) / _MIB:.0f}",
        ]


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"
