"""What the figures are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases import START
from benchmarks.figures import CaseResult, Results
from benchmarks.rounds import EXPORT, IMPORT

_MIB = 2**20
_ABOVE_MIB = 1024
_NOISE_PERCENT = 5
"""Threads do not meet at the same moment in each run: so much more is the same."""

_SMALL_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Goal:
    """What of which, what is asked for and what was found, as text; and whether it is reached."""

    what: str
    asked: str
    found: str
    reached: bool


def goals(results: Results) -> Iterator[Goal]:
    """All goals of which something was measured."""
    for case in results.cases:
        for step in (IMPORT, EXPORT):
            if case.role == START:
                yield _start(case, step)
            if case.goal is not None:
                yield _ratio(case, step, case.goal)
    for case in results.cases:
        yield _above(case)
    for case in results.cases:
        base = None if case.base is None else results.case(case.base)
        if base is not None:
            yield from (_larger(case, base, step) for step in (IMPORT, EXPORT))


def _start(case: CaseResult, step: str) -> Goal:
    seconds = case.figures(step).wall_seconds.median
    return Goal(
        f"{case.title}, {step}: the whole process",
        f"under {_SMALL_SECONDS} s",
        f"{seconds:.1f} s",
        seconds < _SMALL_SECONDS,
    )


def _ratio(case: CaseResult, step: str, goal: float) -> Goal:
    ratio = case.figures(step).ratio
    median = 0.0 if ratio is None else ratio.median
    return Goal(
        f"{case.title}, {step}: speed as a part of the copy's",
        f"at least {goal}",
        f"{median:.2f}",
        median >= goal,
    )


def _above(case: CaseResult) -> Goal:
    above = case.figures(IMPORT).above_bytes / _MIB
    return Goal(
        f"{case.title}, import: memory above the interpreter's own",
        f"under {_ABOVE_MIB} MiB",
        f"{above:.0f} MiB",
        above < _ABOVE_MIB,
    )


def _larger(case: CaseResult, base: CaseResult, step: str) -> Goal:
    peak, of_base = (one.figures(step).peak_bytes / _MIB for one in (case, base))
    times = case.hf_bytes / base.hf_bytes
    return Goal(
        f"{case.title}, {step}: memory, at {times:.1f} times the size of {base.title}",
        f"no more than {of_base:.0f} MiB, {_NOISE_PERCENT} % for noise",
        f"{peak:.0f} MiB",
        peak <= of_base * (1 + _NOISE_PERCENT / 100),
    )
