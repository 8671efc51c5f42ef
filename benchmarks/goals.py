"""What the figures are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from benchmarks.cases import SPEED, START
from benchmarks.figures import CaseResult, Results
from benchmarks.rounds import EXPORT, IMPORT, TORCH, VERIFY

_MIB = 2**20
_ABOVE_MIB = 1024
_NOISE_PERCENT = 5
"""Threads do not meet at the same moment in each run: so much more is the same."""

_OUTSIDE_PERCENT = 10


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
            if case.goal is not None:
                yield _ratio(case, step, case.goal)
    for case in results.cases:
        yield _above(case)
    for case in results.cases:
        base = None if case.base is None else results.case(case.base)
        if base is not None:
            yield from (_larger(case, base, step) for step in (IMPORT, EXPORT))
    for small in (case for case in results.cases if case.role == START):
        for case in results.cases:
            if case.role == SPEED:
                yield from (_outside(case, small, step) for step in (IMPORT, EXPORT, VERIFY))


def _ratio(case: CaseResult, step: str, goal: float) -> Goal:
    ratio = case.figures(step).ratio
    median = inf if ratio is None else ratio.median
    other = "that of `cp` and `sync`" if case.role == SPEED else f"`{TORCH}`"
    return Goal(
        f"{case.title}, {step}: time of the whole process, beside {other}",
        f"at most {goal}",
        f"{median:.2f}",
        median <= goal,
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


def _outside(case: CaseResult, small: CaseResult, step: str) -> Goal:
    """A clock that leaves out work would show in the start and the end of larger models."""
    one, other = case.figures(step), small.figures(step)
    longer = one.start_seconds + one.end_seconds - other.start_seconds - other.end_seconds
    allowed = one.seconds.median * _OUTSIDE_PERCENT / 100
    return Goal(
        f"{case.title}, {step}: start and end, beside those of the small model",
        f"at most {allowed:.2f} s longer, {_OUTSIDE_PERCENT} % of the work",
        f"{longer:+.2f} s",
        longer <= allowed,
    )
