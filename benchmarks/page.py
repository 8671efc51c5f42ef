"""The tables of docs/benchmarks.md, and everything else there that is made from the results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.cases import MEMORY, SPEED, START
from benchmarks.figures import CaseResult, Results, Spread, StepFigures
from benchmarks.goals import goals
from benchmarks.plot import plot
from benchmarks.rounds import TORCH

BEGIN = "<!-- made from {}.json by `python -m benchmarks --render` -->"
END = "<!-- end of what is made from {}.json -->"
_MIB = 2**20


def stem(slow: bool) -> str:
    """The name of the documents, without its suffix."""
    return "benchmarks-slow-disk" if slow else "benchmarks"


def write_documents(folder: Path, results: Results) -> None:
    """Write benchmarks.json and .svg, or those of a slow disk, and the tables into benchmarks.md.

    The page is made if there is none; the text around the tables of an existing one stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(results.slow_disk is not None)
    text = json.dumps(results.document(), indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, "utf-8")
    (folder / f"{name}.svg").write_text(plot(results), "utf-8")
    page = folder / "benchmarks.md"
    before = page.read_text("utf-8") if page.exists() else _EMPTY
    page.write_text(with_tables(before, results), "utf-8")


_EMPTY = "# Benchmarks\n" + "".join(
    f"\n{BEGIN.format(stem(slow))}\n{END.format(stem(slow))}\n" for slow in (False, True)
)


def read_results(folder: Path, *, slow: bool = False) -> Results:
    """The results in benchmarks.json, or those of a slow disk."""
    return Results.from_document(json.loads((folder / f"{stem(slow)}.json").read_text("utf-8")))


def with_tables(page: str, results: Results) -> str:
    """The page with its tables made anew; ValueError if their place is not marked."""
    first, last = (mark.format(stem(results.slow_disk is not None)) for mark in (BEGIN, END))
    head, begin, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"no place for the tables: {first} and {last} are not both there")
    return f"{head}{first}\n\n{tables(results)}\n{last}{tail}"


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    host = "; ".join(f"{name}: {value}" for name, value in results.host.items())
    rounds = f"{results.rounds} round{'s' * (results.rounds > 1)}"
    parts = [
        f"Measured {results.measured} by `{results.command}`, medians of {rounds}.\n{host}.\n",
        "### The disk\n",
        _disk_table(results),
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
    """One model; what stands beside what is not said of one that is measured for memory."""
    columns = {SPEED: ["GB/s", "beside the copy"], START: [f"beside `{TORCH}`"], MEMORY: []}
    return _table(
        [
            "step",
            *columns[case.role],
            "whole process, s",
            "its work, s",
            "CPU s of the work",
            "peak MiB",
            "the interpreter's own",
            "above it",
        ],
        (_row(step, case.figures(step), case.role) for step in case.runs),
    )


def _row(step: str, one: StepFigures, role: str) -> Iterator[str]:
    yield step
    if role == SPEED:
        yield f"{one.gb_per_second:.2f}"
    if role != MEMORY:
        yield "" if one.ratio is None else _spread(one.ratio)
    yield _spread(one.wall_seconds)
    yield f"{one.seconds.median:.2f}"
    yield f"{one.cpu_seconds:.2f}"
    for nbytes in (one.peak_bytes, one.own_bytes, one.above_bytes):
        yield f"{nbytes / _MIB:.0f}"


def _disk_table(results: Results) -> str:
    """What it takes without a program around it, between the rounds."""
    held = "the disk itself" if results.slow_disk is None else f"held to {results.slow_disk:g} GB/s"
    return _table(
        [f"written, {held}", "GB/s"],
        ((way, _spread(Spread.of(speeds))) for way, speeds in results.disk.items()),
    )


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
