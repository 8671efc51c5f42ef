"""Options, and the order of everything."""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import (
    CASES,
    EXCHANGE_MODEL,
    LIVE_MODEL,
    MEMORY,
    OTHERS,
    SHARED_MODEL,
    SPEED,
    Case,
    reduced,
)
from benchmarks.disk_speed import Speeds, joined, measure
from benchmarks.exchange import ExchangeResults, exchange_case, measure_exchange
from benchmarks.figures import CaseResult, Results, join_runs
from benchmarks.host import describe
from benchmarks.live import LiveResults, live_case, measure_live
from benchmarks.loop_disk import can_make_disks
from benchmarks.model_files import ModelFiles
from benchmarks.page import (
    PARTS,
    part_tables,
    read_part,
    read_results,
    stem,
    tables,
    write_documents,
    write_part,
)
from benchmarks.processes import BenchmarkError, compile_package
from benchmarks.rounds import Bench
from benchmarks.shared_blocks import SYSTEMS, SharedResults, measure_shared, shared_case
from benchmarks.slow_disk import slow_disk

_ROUNDS = 5
_DISK_BYTES, _LEAST_DISK_BYTES = 1 << 30, 1 << 26
"""With how many the disk is measured: no more than a model has; if none is measured for speed."""

_DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the documents; returns the exit status."""
    options = _parser().parse_args(arguments)
    out: Path | None = options.out
    if options.render:
        folder = out or _DOCS
        for slow in (False, True):
            if (folder / f"{stem(slow=slow)}.json").exists():
                write_documents(folder, read_results(folder, slow=slow))
        for name in PARTS:
            if (part := read_part(folder, name)) is not None:
                write_part(folder, part)
        return 0
    whole = options.layers is None and not options.tiny and options.case is None
    try:
        with tempfile.TemporaryDirectory(prefix="megatron-bridge-bench-") as temporary:
            folder = (options.folder or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            compile_package()
            results = _measure(options, folder) if _cases(options) else None
            parts = list(_measure_others(options, folder))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    writes = out is not None or whole
    if results is not None:
        print(tables(results))
        if writes:
            write_documents(out or _DOCS, results)
    for part in parts:
        print(part_tables(part))
        if writes or (options.case is not None and not options.tiny and options.layers is None):
            write_part(out or _DOCS, part)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [case.name for case in (*CASES, *OTHERS)]
    add = parser.add_argument
    add(
        "--rounds",
        type=int,
        default=_ROUNDS,
        help=f"rounds that count, behind one that does not ({_ROUNDS})",
    )
    add("--case", action="append", choices=names, help="only this model; may be repeated")
    add("--folder", type=Path, help="where the files go; a temporary folder if not given")
    add(
        "--slow-disk",
        type=float,
        metavar="GB/S",
        help="on a disk that the kernel holds back to so many GB/s, of 10**9 bytes, instead of the "
        "disk itself; needs root. Models that are measured for their memory are left out",
    )
    add(
        "--keep",
        action="store_true",
        help="leave models measured for speed in --folder for next time",
    )
    add("--layers", type=int, help="decoder layers instead of the model's, to try it out")
    add("--tiny", action="store_true", help="the widths of the tests, to try it out")
    add(
        "--out",
        type=Path,
        help="where benchmarks.json, .svg and .md go: docs/; if --case, --layers or --tiny is "
        "given, nowhere",
    )
    add("--render", action="store_true", help="measure nothing: make .svg and tables of .json anew")
    return parser


def _measure(options: argparse.Namespace, folder: Path) -> Results:
    if options.rounds < 1:
        raise BenchmarkError("--rounds must be at least 1")
    if options.keep and options.folder is None:
        raise BenchmarkError("--keep needs a --folder")
    if options.slow_disk is None:
        return _measure_cases(options, folder)
    if options.keep:
        raise BenchmarkError("--keep: a slow disk is gone in the end; leave one of the two out")
    if options.slow_disk <= 0:
        raise BenchmarkError("--slow-disk must be more than 0")
    needed = _space([ModelFiles(case, folder) for case in _cases(options)], keep=False)
    with slow_disk(folder, options.slow_disk, needed) as mounted:
        return _measure_cases(options, mounted)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        reduced(case, options.layers, tiny=options.tiny)
        for case in CASES
        if (options.case is None or case.name in options.case)
        and (options.slow_disk is None or case.role != MEMORY)
    ]


def _measure_cases(options: argparse.Namespace, folder: Path) -> Results:
    files = [ModelFiles(case, folder) for case in _cases(options)]
    _check_space(folder, files, keep=options.keep)
    speeds: list[Speeds] = []
    return Results(
        **_about(options, folder),
        rounds=options.rounds,
        cases=[_measure_case(one, options.rounds, speeds, keep=options.keep) for one in files],
        disk=joined(speeds or [measure(folder, _LEAST_DISK_BYTES)]),
        slow_disk=options.slow_disk,
    )


def _measure_others(
    options: argparse.Namespace, folder: Path
) -> Iterator[SharedResults | LiveResults | ExchangeResults]:
    """What is measured in ways of its own; a slow disk has nothing to do with it."""
    if options.slow_disk is not None:
        return
    asked = options.case or [case.name for case in OTHERS]
    about, tiny, layers = _about(options, folder), options.tiny, options.layers
    if SHARED_MODEL.name in asked and (options.case or can_make_disks(SYSTEMS)):
        yield measure_shared(folder, shared_case(layers, tiny=tiny), options.rounds, about)
    if LIVE_MODEL.name in asked:
        yield measure_live(folder, live_case(layers, tiny=tiny), options.rounds, about, tiny=tiny)
    if EXCHANGE_MODEL.name in asked:
        case = exchange_case(layers, tiny=tiny)
        yield measure_exchange(folder, case, options.rounds, about, tiny=tiny)


def _about(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "command": _command(options),
        "measured": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "host": describe(folder),
    }


def _command(options: argparse.Namespace) -> str:
    """The command that measures the same; where its files lie does not matter."""
    arguments = [] if options.rounds == _ROUNDS else [f"--rounds={options.rounds}"]
    arguments += [f"--case={name}" for name in options.case or ()]
    arguments += [] if options.layers is None else [f"--layers={options.layers}"]
    arguments += ["--tiny"] * options.tiny
    arguments += [] if options.slow_disk is None else [f"--slow-disk={options.slow_disk:g}"]
    return f'make bench ARGS="{" ".join(arguments)}"' if arguments else "make bench"


def _space(files: Sequence[ModelFiles], *, keep: bool) -> int:
    """Bytes: three times the largest model, and what lies there besides."""
    left_over = sum(one.nbytes for one in files if keep and one.case.role != MEMORY)
    largest = max((one.nbytes for one in files), default=0)
    return int(1.05 * (3 * largest + left_over))


def _check_space(folder: Path, files: Sequence[ModelFiles], *, keep: bool) -> None:
    needed = _space(files, keep=keep) - sum(one.nbytes for one in files if one.ready())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BenchmarkError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; choose "
            "another --folder, or single models with --case"
        )


def _measure_case(
    files: ModelFiles, rounds: int, speeds: list[Speeds], *, keep: bool
) -> CaseResult:
    """Measure one model; between the rounds of one that is measured for speed, the disk, too."""
    case = files.case
    bench = Bench(files, lambda line: print(f"{case.title}: {line}", file=sys.stderr, flush=True))
    try:
        files.make()
        warm_up = bench.warm_up()
        if case.role == MEMORY:
            runs = warm_up
        else:
            each = []
            for number in range(rounds):
                if case.role == SPEED:
                    nbytes = min(files.nbytes, _DISK_BYTES)
                    speeds.append(measure(files.root, nbytes))
                each.append(bench.round(number))
            runs = join_runs(each)
        return CaseResult(
            name=case.name,
            title=case.title,
            role=case.role,
            base=case.base,
            goal=case.goal,
            hf_bytes=files.file_bytes(),
            megatron_bytes=bench.megatron_bytes(),
            runs=runs,
        )
    finally:
        bench.remove()
        if not keep or case.role == MEMORY:
            files.remove()
