"""What the benchmarks found is what the documentation says."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.cases import CASES, MEMORY
from benchmarks.exchange import (
    DELTA,
    FLOOR,
    GATHERS,
    REFIT,
    WAYS,
    ExchangeResults,
    RankFigures,
    exchange_goals,
)
from benchmarks.figures import CaseResult, Results, Spread, join_runs
from benchmarks.goals import goals
from benchmarks.live import Filling, LiveResults, Passes, live_goals
from benchmarks.live_filling import FILL, READ
from benchmarks.page import (
    PARTS,
    part_tables,
    read_part,
    read_results,
    stem,
    tables,
    with_tables,
    write_documents,
    write_part,
)
from benchmarks.plot import plot
from benchmarks.processes import Measurement
from benchmarks.rounds import COPY_HF, COPY_MEGATRON, EXPORT, IMPORT, TORCH, VERIFY
from benchmarks.shared_blocks import SharedImport, SharedResults, shared_goals

DOCS = Path(__file__).resolve().parents[2] / "docs"
MIB = 2**20


# --- The documentation ---------------------------------------------------------------------------


both_disks = pytest.mark.parametrize("slow", [False, True])


@both_disks
def test_the_figures_of_the_document_follow_from_its_measurements(slow: bool) -> None:
    document = json.loads((DOCS / f"{stem(slow=slow)}.json").read_text("utf-8"))
    assert read_results(DOCS, slow=slow).document() == document


@both_disks
def test_the_page_and_the_picture_are_made_from_the_document(slow: bool) -> None:
    results = read_results(DOCS, slow=slow)
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    assert with_tables(page, stem(slow=slow), tables(results)) == page
    assert plot(results) == (DOCS / f"{stem(slow=slow)}.svg").read_text("utf-8")


@both_disks
def test_the_document_is_of_all_rounds_at_full_size(slow: bool) -> None:
    results = read_results(DOCS, slow=slow)
    expected = [(c.name, c.title) for c in CASES if not slow or c.role != MEMORY]
    assert [(case.name, case.title) for case in results.cases] == expected
    assert (results.slow_disk is not None) == slow
    assert results.rounds >= 5
    assert all(case.hf_bytes >= 4e9 for case in results.cases if case.name != "small")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_page_is_made_from_its_document(name: str) -> None:
    results = read_part(DOCS, name)
    assert results is not None
    document = json.loads((DOCS / f"{name}.json").read_text("utf-8"))
    assert json.loads(json.dumps(results.document())) == document
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    assert with_tables(page, name, part_tables(results)) == page
    assert results.rounds >= 5
    assert "tiny" not in results.model


def test_a_part_that_was_not_measured(tmp_path: Path) -> None:
    assert [read_part(tmp_path, name) for name in PARTS] == [None] * len(PARTS)


def test_a_changed_figure_is_seen(tmp_path: Path) -> None:
    results = read_results(DOCS)
    write_documents(tmp_path, results)
    page = (tmp_path / "benchmarks.md").read_text("utf-8")
    dense = results.case("dense")
    assert dense is not None
    slower = [replace(run, wall_seconds=2 * run.wall_seconds) for run in dense.runs[IMPORT]]
    changed = replace(dense, runs={**dense.runs, IMPORT: slower})
    cases = [changed if case is dense else case for case in results.cases]
    other = replace(results, cases=cases)
    assert with_tables(page, stem(slow=False), tables(results)) == page
    assert with_tables(page, stem(slow=False), tables(other)) != page
    assert plot(other) != plot(results)


def test_text_around_the_tables_stays(tmp_path: Path) -> None:
    results = example_results()
    write_documents(tmp_path, results)
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{page.read_text('utf-8')}behind\n", "utf-8")
    write_documents(tmp_path, replace(results, measured="2001-02-03"))
    text = page.read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("behind\n")
    assert text.count("### Goals") == 1
    assert "2001-02-03" in text
    write_documents(tmp_path, replace(results, slow_disk=0.25))
    both = page.read_text("utf-8")
    assert both.count("### Goals") == 2
    assert both.startswith(text[: text.index("### Goals")])
    assert "held to 0.25 GB/s" in both
    assert read_results(tmp_path) == replace(results, measured="2001-02-03")
    assert read_results(tmp_path, slow=True) == replace(results, slow_disk=0.25)
    with pytest.raises(ValueError, match="no place for the tables"):
        with_tables("a page", stem(slow=False), tables(results))


# --- Between ranks ------------------------------------------------------------------------------


def example_exchange() -> ExchangeResults:
    """Two rounds on two ranks, the second rank the slower one."""
    ranks = [
        RankFigures(
            seconds={way: [times * slower, times * slower] for way, times in seconds.items()},
            sent_bytes={REFIT: 1_000_000, DELTA: 45_000 * slower, GATHERS: 3_000_000},
            collectives={REFIT: 4},
            buffer_bytes={REFIT: 5 * slower * MIB},
            prepare_seconds=0.5,
            wrong={},
        )
        for slower in (1, 2)
        for seconds in [dict.fromkeys(WAYS, 1.0) | {FLOOR: 0.5, REFIT: 0.875, GATHERS: 4.0}]
    ]
    host = {"cores": "2"}
    return ExchangeResults("make bench", "2001-01-01", host, "a model", 7_000_000, 2 * MIB, ranks)


def test_figures_of_the_exchange() -> None:
    results = example_exchange()
    assert results.seconds(REFIT) == [1.75, 1.75]
    assert results.ratio(REFIT, FLOOR) == Spread(1.75, 1.75, 1.75)
    # Three bytes for each of 30,000 words that changed.
    assert results.to_changes == pytest.approx(135_000 / 90_000)
    assert results.to_window == 5
    assert [(goal.found, goal.reached) for goal in exchange_goals(results)] == [
        ("1.75", False),
        ("4.57", False),
        ("5.00", False),
        ("1.50", False),
    ]
    assert ExchangeResults.from_document(results.document()) == results


# --- The live model ------------------------------------------------------------------------------


def example_live() -> LiveResults:
    """Two rounds; filling takes more memory in the second one."""
    filling = {
        FILL: [Filling(3.0, 1000, 60 * MIB), Filling(4.0, 1000, 70 * MIB)],
        READ: [Filling(2.0, 1100, 0), Filling(4.0, 1100, 0)],
    }
    passes = [
        Passes("qwen3-vl", 1, "forward", [1.004, 1.0], [1.0, 1.0]),
        Passes("qwen3-vl", 2, "forward and backward", [3.0, 2.0], [2.0, 2.0]),
    ]
    host = {"cores": "2"}
    return LiveResults("make bench", "2001-01-01", host, "a model", filling, passes)


def test_figures_of_the_live_model(tmp_path: Path) -> None:
    results = example_live()
    assert results.to_read == Spread(1.25, 1.0, 1.5)
    assert [(goal.found, goal.reached) for goal in live_goals(results)] == [
        ("1.25", True),
        ("70 MiB", False),
        ("1.00", True),
        ("1.25", False),
    ]
    write_part(tmp_path, results)
    assert read_part(tmp_path, "benchmarks-live") == results
    assert "| qwen3-vl, forward | 1 |" in (tmp_path / "benchmarks.md").read_text("utf-8")


# --- Shared blocks -------------------------------------------------------------------------------


def test_figures_of_shared_blocks(tmp_path: Path) -> None:
    imports = {
        "XFS": [SharedImport(0.5, 9), SharedImport(0.75, 10), SharedImport(2.0, 8)],
        "btrfs": [SharedImport(1.0, 11)] * 3,
    }
    host = {"cores": "2"}
    results = SharedResults("make bench", "2001-01-01", host, "a model", 1000, imports)
    assert [(goal.found, goal.reached) for goal in shared_goals(results)] == [
        ("0.75 s", True),
        ("1.00 %", True),
        ("1.00 s", False),
        ("1.10 %", False),
    ]
    write_part(tmp_path, results)
    assert read_part(tmp_path, "benchmarks-shared-blocks") == results
    page = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert "| XFS | 0.75 (0.50–2.00) | 0.0 |" in page


# --- Figures -------------------------------------------------------------------------------------


def measurement(
    seconds: float, *, start: float = 2.0, peak: int = 700, own: int = 300
) -> Measurement:
    """One run that ended in 0.5 s; memory in MiB."""
    wall = start + seconds + 0.5
    return Measurement(wall, start, seconds, 3 * seconds, 1.25, peak * MIB, own * MIB)


def copied(seconds: float) -> Measurement:
    """A copy, which is all work."""
    return Measurement(seconds, 0.0, seconds, seconds, 0.0, MIB, 0)


def example_results() -> Results:
    """Three rounds of one model, and one larger model measured for its memory."""
    dense, large = (next(c for c in CASES if c.name == name) for name in ("dense", "dense-large"))
    runs = {
        IMPORT: [measurement(s, peak=p) for s, p in ((4.0, 700), (8.0, 900), (5.0, 800))],
        EXPORT: [measurement(s) for s in (2.0, 4.0, 8.0)],
        VERIFY: [measurement(s) for s in (1.0, 2.0, 4.0)],
        COPY_HF: [copied(s) for s in (5.2, 5.25, 6.0)],
        COPY_MEGATRON: [copied(s) for s in (9.0, 13.0, 7.0)],
    }
    once = {step: [measurement(9.0, peak=1400)] for step in (IMPORT, EXPORT, VERIFY)}
    cases = [
        CaseResult(c.name, c.title, c.role, c.base, c.goal, size, size + 7, these)
        for c, size, these in ((dense, 6_000_000_000, runs), (large, 12_300_000_000, once))
    ]
    disk = {"one direct stream": [1.5, 1.25, 1.75]}
    return Results("make bench", "2001-01-01", 3, {"cores": "2"}, disk, None, cases)


def test_figures_of_a_step() -> None:
    results = example_results()
    dense = results.cases[0]
    done = dense.figures(IMPORT)
    # Whole processes, by round and not of the medians: that is 1.43.
    assert done.ratio == Spread(1.25, 1.25, 2.0)
    assert done.seconds == Spread(5.0, 4.0, 8.0)
    assert done.gb_per_second == pytest.approx(0.8)
    assert (done.start_seconds, done.end_seconds) == pytest.approx((2.0, 0.5))
    assert (done.cpu_seconds, done.start_cpu_seconds) == (13.75, 1.25)
    found = (done.peak_bytes, done.own_bytes, done.above_bytes)
    assert found == (900 * MIB, 300 * MIB, 600 * MIB)
    # Export is beside the copy of what it reads.
    assert dense.figures(EXPORT).ratio == Spread(0.5, 0.5, 1.5)
    assert dense.figures(EXPORT).nbytes == dense.megatron_bytes
    assert dense.figures(COPY_HF).ratio is None
    assert results.cases[1].figures(IMPORT).ratio is None


def test_goals_that_are_not_reached_are_said() -> None:
    assert [(goal.found, goal.reached) for goal in goals(example_results())] == [
        ("1.25", False),
        ("0.50", True),
        ("600 MiB", True),
        ("1100 MiB", False),
        ("1400 MiB", False),
        ("1400 MiB", False),
    ]


def test_work_outside_of_the_clock_is_seen() -> None:
    results = example_results()
    case = next(c for c in CASES if c.name == "small")
    runs = {step: [measurement(0.2, start=1.75)] for step in (IMPORT, EXPORT, VERIFY)}
    runs[TORCH] = [copied(9.8)]
    small = CaseResult(case.name, case.title, case.role, None, 0.33, 5_000_000, 5_000_000, runs)
    assert small.figures(VERIFY).ratio == Spread.of([0.25])
    found = [
        (goal.asked, goal.found, goal.reached)
        for goal in goals(replace(results, cases=[small, *results.cases]))
        if "beside those of the small model" in goal.what
    ]
    assert found == [
        ("at most 0.50 s longer, 10 % of the work", "+0.25 s", True),
        ("at most 0.40 s longer, 10 % of the work", "+0.25 s", True),
        ("at most 0.20 s longer, 10 % of the work", "+0.25 s", False),
    ]


def test_rounds_are_joined_by_step() -> None:
    rounds = [
        {COPY_HF: [measurement(1.0)], VERIFY: [measurement(2.0)], IMPORT: [measurement(3.0)]},
        {VERIFY: [measurement(5.0)], IMPORT: [measurement(6.0)], COPY_HF: [measurement(4.0)]},
    ]
    joined = join_runs(rounds)
    assert list(joined) == [IMPORT, VERIFY, COPY_HF]
    assert [run.seconds for run in joined[COPY_HF]] == [1.0, 4.0]


def test_the_picture_is_a_drawing_of_every_step() -> None:
    results = example_results()
    root = ET.fromstring(plot(results))
    assert root.attrib["width"] == "700"
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert texts.count("import") == 3  # speed and memory of one model, memory of the other
    assert {"1.25", "0.50", "1400", "900"} <= set(texts)
    assert "prefers-color-scheme: dark" in plot(results)
    height = float(root.attrib["height"])
    assert all(float(element.attrib.get("y", 0)) < height for element in root.iter())
