"""What the measurements come to, and the JSON document that holds both.

The document's `runs` are what was measured; its `figures` follow from them, and are there to be
read by others. Reading the document back uses the former only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.disk_speed import Speeds
from benchmarks.processes import Measurement
from benchmarks.rounds import COPY_HF, COPY_MEGATRON, COPY_OF, EXPORT, TORCH, Runs, beside

type Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, the least and the greatest of them."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """The median, and the range if there is one."""
        if self.min == self.max:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.min:.2f}–{self.max:.2f})"


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One step over all rounds.

    nbytes: of the files that the copy beside it copies; so gb_per_second (10**9 bytes) is of these,
    read once and, but for verify, written once, by the whole process. ratio: the seconds of the
    whole process divided by those of what it is compared with, of the same round; None where
    nothing stands beside it. wall_seconds: from start to end of the process;
    seconds: of its work; start_seconds: of the interpreter and its imports before.
    end_seconds: after the work, until the process is gone. cpu_seconds: of all threads, without
    the start. Memory is anonymous: peak_bytes the most of all
    rounds, own_bytes what the interpreter and its imports hold, above_bytes the most above that.
    """

    nbytes: int
    seconds: Spread
    gb_per_second: float
    ratio: Spread | None
    wall_seconds: Spread
    start_seconds: float
    end_seconds: float
    cpu_seconds: float
    start_cpu_seconds: float
    peak_bytes: int
    own_bytes: int
    above_bytes: int


@dataclass(frozen=True)
class CaseResult:
    """One model: bytes of its files, and what was measured."""

    name: str
    title: str
    role: str
    base: str | None
    goal: float | None
    hf_bytes: int
    megatron_bytes: int
    runs: Runs

    def figures(self, step: str) -> StepFigures:
        """What the measurements of a step come to."""
        runs = self.runs[step]
        others = self.runs.get(beside(self.role, step) or "")

        def spread(value: Callable[[Measurement], float]) -> Spread:
            return Spread.of([value(run) for run in runs])

        seconds = spread(lambda run: run.seconds)
        nbytes = self.megatron_bytes if step in (EXPORT, COPY_MEGATRON) else self.hf_bytes
        ratios = [
            run.wall_seconds / other.wall_seconds
            for other, run in zip(others or runs, runs, strict=True)
        ]
        return StepFigures(
            nbytes=nbytes,
            seconds=seconds,
            gb_per_second=nbytes / spread(lambda run: run.wall_seconds).median / 1e9,
            ratio=None if others is None else Spread.of(ratios),
            wall_seconds=spread(lambda run: run.wall_seconds),
            start_seconds=spread(lambda run: run.start_seconds).median,
            end_seconds=spread(
                lambda run: run.wall_seconds - run.start_seconds - run.seconds
            ).median,
            cpu_seconds=spread(lambda run: run.cpu_seconds - run.start_cpu_seconds).median,
            start_cpu_seconds=spread(lambda run: run.start_cpu_seconds).median,
            peak_bytes=max(run.peak_bytes for run in runs),
            own_bytes=int(spread(lambda run: run.start_bytes).median),
            above_bytes=max(run.peak_bytes - run.start_bytes for run in runs),
        )


@dataclass(frozen=True)
class Results:
    """One run of the benchmarks.

    host: see `host.describe`. measured: a date. disk: GB/s that were measured between the rounds,
    see `disk_speed`. slow_disk: the GB/s that the disk was held back to, None for the disk itself.
    """

    command: str
    measured: str
    rounds: int
    host: Mapping[str, str]
    disk: Speeds
    slow_disk: float | None
    cases: Sequence[CaseResult]

    def case(self, name: str) -> CaseResult | None:
        """The result of a model, None if it was not measured."""
        return next((case for case in self.cases if case.name == name), None)

    def document(self) -> Document:
        """As JSON."""
        return {
            "command": self.command,
            "measured": self.measured,
            "rounds": self.rounds,
            "host": dict(self.host),
            "disk": dict(self.disk),
            "slow_disk": self.slow_disk,
            "cases": [
                asdict(case) | {"figures": {step: asdict(case.figures(step)) for step in case.runs}}
                for case in self.cases
            ],
        }

    @classmethod
    def from_document(cls, document: Document) -> Results:
        """The results that a document holds."""
        cases = [
            CaseResult(
                **{key: value for key, value in case.items() if key not in ("runs", "figures")},
                runs={
                    step: [Measurement(**run) for run in runs]
                    for step, runs in case["runs"].items()
                },
            )
            for case in document["cases"]
        ]
        return cls(**{**document, "cases": cases})


def join_runs(rounds: Sequence[Runs]) -> Runs:
    """The measurements of several rounds, by step; copies last."""
    order = [*COPY_OF, COPY_HF, COPY_MEGATRON, TORCH]
    steps = [step for step in order if step in rounds[0]]
    return {step: [run for one in rounds for run in one[step]] for step in steps}
