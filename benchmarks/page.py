"""The tables of docs/benchmarks.md, and everything else there that is made from the results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.cases import SPEED
from benchmarks.figures import CaseResult, Results, Spread, StepFigures
from benchmarks.goals import goals
from benchmarks.plot import plot

BEGIN = "<!-- made from benchmarks.json by `python -m benchmarks --render` -->"
END = "<!-- end of what is made from benchmarks.json -->"
_MIB = 2**20


def write_documents(folder: Path, results: Results) -> None:
    """Write benchmarks.json, benchmarks.svg, and the tables into benchmarks.md.

    The page is made if there is none; the text around the tables of an existing one stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.document(), indent=1) + "\n"
    (folder / "benchmarks.json").write_text(text, "utf-8")
    (folder / "benchmarks.svg").write_text(plot(results), "utf-8")
    page = folder / "benchmarks.md"
    before = page.read_text("utf-8") if page.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    page.write_text(with_tables(before, results), "utf-8")


def read_results(folder: Path) -> Results:
    """The results in benchmarks.json."""
    return Results.from_document(json.loads((folder / "benchmarks.json").read_text("utf-8")))


def with_tables(page: str, results: Results) -> str:
    """The page with its tables made anew; ValueError if their place is not marked."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the tables: {BEGIN} and {END} are not both there")
    return f"{head}{BEGIN}\n\n{tables(results)}\n{END}{tail}"


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    host = "; ".join(f"{name}: {value}" for name, value in results.host.items())
    rounds = f"{results.rounds} round{'s' * (results.rounds > 1)}"
    parts = [
        f"Measured {results.measured} by `{results.command}`, medians of {rounds}.\n{host}.\n",
        "### Goals\n",
        _table(
            ["", "goal", "found", "reached"],
            (
                (goal.what, goal.asked, goal.found, "yes" if goal.reached else "**no**")
                for goal in goals(results)
            ),
        ),
    ]
    for case in results.cases:
        parts += [f"### {_heading(case)}\n", _case_table(case)]
    parts += ["### Whole processes\n", _process_table(results.cases)]
    return "\n".join(parts)


def _heading(case: CaseResult) -> str:
    return (
        f"{case.title}: {_size(case.hf_bytes)} of Hugging Face files, "
        f"{_size(case.megatron_bytes)} of Megatron files"
    )


def _case_table(case: CaseResult) -> str:
    """The work of one model; GB/s say nothing of one that is measured for something else."""
    fast = case.role == SPEED
    return _table(
        [
            "step",
            *(["GB/s", "of the copy"] if fast else []),
            "seconds",
            "CPU seconds",
            "peak MiB",
            "the interpreter's own",
            "above it",
        ],
        (_row(step, case.figures(step), fast=fast) for step in case.runs),
    )


def _row(step: str, one: StepFigures, *, fast: bool) -> Iterator[str]:
    yield step
    if fast:
        yield f"{one.gb_per_second:.2f}"
        yield "" if one.ratio is None else _spread(one.ratio)
    yield _spread(one.seconds)
    yield f"{one.cpu_seconds:.2f}"
    for nbytes in (one.peak_bytes, one.own_bytes, one.above_bytes):
        yield f"{nbytes / _MIB:.0f}"


def _process_table(cases: Sequence[CaseResult]) -> str:
    """What lies before and behind the work."""
    return _table(
        ["model", "step", "start", "work", "end", "whole", "CPU seconds of the start"],
        (
            (
                case.title,
                step,
                f"{one.start_seconds:.2f}",
                f"{one.seconds.median:.2f}",
                f"{one.end_seconds:.2f}",
                _spread(one.wall_seconds),
                f"{one.start_cpu_seconds:.2f}",
            )
            for case in cases
            for step in case.runs
            for one in [case.figures(step)]
        ),
    )


def _spread(spread: Spread) -> str:
    """The median, and the range if there is one."""
    if spread.min == spread.max:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.min:.2f}–{spread.max:.2f})"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.2f} MB"


def _table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; the first column to the left, all others as the page likes."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
