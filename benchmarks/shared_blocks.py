"""Imports on file systems that can share blocks between files: how long, and how many new blocks.

    python -m benchmarks --case shared-blocks [--rounds 5]

Each file system is a file as a disk, which takes root and the tools that make it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.cases import SHARED_MODEL, Case, reduced
from benchmarks.figures import Spread
from benchmarks.goals import Goal
from benchmarks.loop_disk import loop_disk
from benchmarks.model_files import ModelFiles
from benchmarks.processes import run
from benchmarks.rounds import SETTLE_SECONDS

SYSTEMS = {"XFS": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}

_SECONDS, _PERCENT = 1.0, 1


@dataclass(frozen=True)
class SharedImport:
    """One import: seconds of the whole process, and by how much the disk is fuller."""

    wall_seconds: float
    new_bytes: int


@dataclass(frozen=True)
class SharedResults:
    """One run; by file system, round by round. The rest is as of figures.Results."""

    command: str
    measured: str
    host: Mapping[str, str]
    model: str
    nbytes: int
    imports: Mapping[str, Sequence[SharedImport]]

    @property
    def rounds(self) -> int:
        """Those that counted."""
        return len(next(iter(self.imports.values())))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The results that a document holds."""
        imports = {
            system: [SharedImport(**one) for one in runs]
            for system, runs in document["imports"].items()
        }
        return cls(**{**document, "imports": imports})


def shared_case(layers: int | None, *, tiny: bool) -> Case:
    """The model that is imported."""
    return reduced(SHARED_MODEL, layers, tiny=tiny)


def measure_shared(
    folder: Path, case: Case, rounds: int, about: Mapping[str, Any]
) -> SharedResults:
    """Make the model on each file system, and import it there.

    Args:
        folder: for the files that stand for disks, which are removed.
        case: of `shared_case`.
        rounds: that count.
        about: command, date and host.

    Raises:
        BenchmarkError: there is no such file system here, or a process failed.
    """
    nbytes, imports = 0, {}
    for system, mkfs in SYSTEMS.items():
        room = 2 * ModelFiles(case, folder).nbytes
        with loop_disk(folder, room, mkfs, "--case shared-blocks") as disk:
            files = ModelFiles(case, disk.folder)
            files.make()
            nbytes = files.file_bytes()
            _import(files.folder, disk.folder)  # blocks of the file system's own are taken once
            imports[system] = [_import(files.folder, disk.folder) for _ in range(rounds)]
    return SharedResults(**about, model=case.title, nbytes=nbytes, imports=imports)


def _import(source: Path, folder: Path) -> SharedImport:
    target = folder / "imported"
    os.sync()
    time.sleep(SETTLE_SECONDS)  # blocks of what was removed are given back in the background
    before = _used(folder)
    command = [sys.executable, "-m", "megatron.bridge", "import", str(source), str(target)]
    measured, _ = run([*command, "--reflink=always", "--json"])
    new = _used(folder) - before
    shutil.rmtree(target)
    return SharedImport(measured.wall_seconds, new)


def _used(folder: Path) -> int:
    """Bytes that are taken of the disk, when all that was written is there."""
    os.sync()
    system = os.statvfs(folder)
    return (system.f_blocks - system.f_bfree) * system.f_frsize


def shared_goals(results: SharedResults) -> Iterator[Goal]:
    """What the figures are compared with."""
    for system, runs in results.imports.items():
        seconds = Spread.of([one.wall_seconds for one in runs]).median
        yield Goal(
            f"{results.model} on {system}, import: time of the whole process",
            f"under {_SECONDS:.0f} s",
            f"{seconds:.2f} s",
            seconds < _SECONDS,
        )
        new = 100 * max(one.new_bytes for one in runs) / results.nbytes
        yield Goal(
            f"{results.model} on {system}, import: new blocks of the disk",
            f"at most {_PERCENT} % of the files",
            f"{new:.2f} %",
            new <= _PERCENT,
        )


def shared_rows(results: SharedResults) -> Iterator[list[str]]:
    """Of the table of all file systems."""
    for system, runs in results.imports.items():
        walls = Spread.of([one.wall_seconds for one in runs])
        new = max(one.new_bytes for one in runs)
        yield [system, str(walls), f"{new / 1e6:.1f}"]
