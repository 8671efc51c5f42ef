"""The tables of docs/benchmarks.md, and everything else there that is made from the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import MEMORY, SPEED, START
from benchmarks.exchange import ExchangeResults, exchange_goals, rows
from benchmarks.figures import CaseResult, Results, Spread, StepFigures
from benchmarks.goals import Goal, goals
from benchmarks.live import LiveResults, filling_rows, live_goals, pass_rows
from benchmarks.plot import plot
from benchmarks.rounds import TORCH
from benchmarks.shared_blocks import SharedResults, shared_goals, shared_rows

BEGIN = "<!-- made from {}.json by `python -m benchmarks --render` -->"
END = "<!-- end of what is made from {}.json -->"
_MIB = 2**20


def stem(*, slow: bool) -> str:
    """The name of the documents, without its suffix."""
    return "benchmarks-slow-disk" if slow else "benchmarks"


def write_documents(folder: Path, results: Results) -> None:
    """Write benchmarks.json and .svg, or those of a slow disk, and the tables into benchmarks.md.

    The page is made if there is none; the text around the tables of an existing one stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(slow=results.slow_disk is not None)
    text = json.dumps(results.document(), indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, "utf-8")
    (folder / f"{name}.svg").write_text(plot(results), "utf-8")
    write_tables(folder, name, tables(results))


def write_part(folder: Path, results: ExchangeResults | LiveResults | SharedResults) -> None:
    """The same for a part of the page that has no picture."""
    name, show = next((name, show) for name, (kind, show) in PARTS.items() if kind is type(results))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.document(), indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, "utf-8")
    write_tables(folder, name, show(results))


def part_tables(results: ExchangeResults | LiveResults | SharedResults) -> str:
    """All tables of a part, in Markdown."""
    return next(show for kind, show in PARTS.values() if kind is type(results))(results)


def read_part(folder: Path, name: str) -> ExchangeResults | LiveResults | SharedResults | None:
    """The results in the document of a part of the page, None if there is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    found: ExchangeResults | LiveResults | SharedResults = PARTS[name][0].from_document(
        json.loads(path.read_text("utf-8"))
    )
    return found


def write_tables(folder: Path, name: str, text: str) -> None:
    """Write the tables of a document into benchmarks.md."""
    page = folder / "benchmarks.md"
    before = page.read_text("utf-8") if page.exists() else _EMPTY
    page.write_text(with_tables(before, name, text), "utf-8")


def read_results(folder: Path, *, slow: bool = False) -> Results:
    """The results in benchmarks.json, or those of a slow disk."""
    return Results.from_document(
        json.loads((folder / f"{stem(slow=slow)}.json").read_text("utf-8"))
    )


def with_tables(page: str, name: str, text: str) -> str:
    """The page with the tables of a document made anew; ValueError if their place is not marked."""
    first, last = (mark.format(name) for mark in (BEGIN, END))
    head, begin, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"no place for the tables: {first} and {last} are not both there")
    return f"{head}{first}\n\n{text}\n{last}{tail}"


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    parts = [
        _measured(results),
        "### The disk\n",
        _disk_table(results),
        "### Goals\n",
        _goals_table(goals(results)),
    ]
    for case in results.cases:
        parts += [f"### {_heading(case)}\n", _case_table(case)]
    parts += ["### Whole processes\n", _process_table(results.cases)]
    return "\n".join(parts)


def live_tables(results: LiveResults) -> str:
    """All tables of the live model, in Markdown."""
    filling = ["process", "beside the read", "s", "GB/s", "MiB above"]
    passes = ["step", "threads", "beside transformers", "ours, s", "transformers', s"]
    return _part(
        results,
        "the live model",
        live_goals(results),
        (f"Filling {results.model}", filling, filling_rows(results)),
        ("Passes", passes, pass_rows(results)),
    )


def shared_tables(results: SharedResults) -> str:
    """All tables of file systems that share blocks, in Markdown."""
    columns = ["import on", "whole process, s", "new blocks, MB"]
    heading = f"{results.model}: {_size(results.nbytes)}"
    table = (heading, columns, shared_rows(results))
    return _part(results, "shared blocks", shared_goals(results), table)


def exchange_tables(results: ExchangeResults) -> str:
    """All tables of what moves between ranks, in Markdown."""
    columns = ["way", "beside the first", "s", "GB sent", "collectives", "buffers"]
    table = (f"{results.model}: {_size(results.nbytes)}", columns, rows(results))
    return _part(results, "the exchange", exchange_goals(results), table)


def _part(
    results: ExchangeResults | LiveResults | SharedResults,
    title: str,
    found: Iterable[Goal],
    *sections: tuple[str, Sequence[str], Iterable[Iterable[str]]],
) -> str:
    """Where it was measured, the goals, and tables: of each the heading, columns and rows."""
    parts = [_measured(results), f"### Goals of {title}\n", _goals_table(found)]
    for heading, columns, table in sections:
        parts += [f"### {heading}\n", _table(columns, table)]
    return "\n".join(parts)


def _measured(results: Results | ExchangeResults | LiveResults | SharedResults) -> str:
    host = "; ".join(f"{name}: {value}" for name, value in results.host.items())
    rounds = f"{results.rounds} round{'s' * (results.rounds > 1)}"
    return f"Measured {results.measured} by `{results.command}`, medians of {rounds}.\n{host}.\n"


def _goals_table(found: Iterable[Goal]) -> str:
    return _table(
        ["", "goal", "found", "reached"],
        (
            (goal.what, goal.asked, goal.found, "yes" if goal.reached else "**no**")
            for goal in found
        ),
    )


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
        yield "" if one.ratio is None else str(one.ratio)
    yield str(one.wall_seconds)
    yield f"{one.seconds.median:.2f}"
    yield f"{one.cpu_seconds:.2f}"
    for nbytes in (one.peak_bytes, one.own_bytes, one.above_bytes):
        yield f"{nbytes / _MIB:.0f}"


def _disk_table(results: Results) -> str:
    """What it takes without a program around it, between the rounds."""
    held = "the disk itself" if results.slow_disk is None else f"held to {results.slow_disk:g} GB/s"
    return _table(
        [f"written, {held}", "GB/s"],
        ((way, str(Spread.of(speeds))) for way, speeds in results.disk.items()),
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
                str(one.wall_seconds),
                f"{one.start_cpu_seconds:.2f}",
            )
            for case in cases
            for step in case.runs
            for one in [case.figures(step)]
        ),
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.2f} MB"


def _table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; the first column to the left, all others as the page likes."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PARTS: dict[str, tuple[Any, Callable[[Any], str]]] = {
    "benchmarks-shared-blocks": (SharedResults, shared_tables),
    "benchmarks-live": (LiveResults, live_tables),
    "benchmarks-exchange": (ExchangeResults, exchange_tables),
}
"""The parts of the page that have a document and tables, and no picture, by the document's name."""

_EMPTY = "# Benchmarks\n" + "".join(
    f"\n{BEGIN.format(name)}\n{END.format(name)}\n"
    for name in (stem(slow=False), stem(slow=True), *PARTS)
)
