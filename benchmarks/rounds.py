"""The steps of a model: one warm-up, then rounds in which every step runs once.

A step stands beside the copy that it is compared with, `cp` and one `sync`; each round begins with
another step, and goes on forwards or backwards in turns, so that none is always behind the same
one. Each step is a process of its own. What it wrote is removed, and the disk is left to finish its
work, before the next one and outside of its time. Caches are not dropped: everything reads what the
memory still holds.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import MEMORY, SPEED
from benchmarks.model_files import ModelFiles
from benchmarks.processes import BenchmarkError, Measurement, run

COPY_HF, COPY_MEGATRON = "copy of the Hugging Face files", "copy of the Megatron files"
IMPORT, EXPORT, VERIFY = "import", "export", "verify"
COPY_OF = {IMPORT: COPY_HF, EXPORT: COPY_MEGATRON, VERIFY: COPY_HF}
"""Step -> the copy that it is compared with: of the same bytes."""

TORCH = "python -c 'import torch'"
"""What the steps of a START case are compared with."""

SETTLE_SECONDS = 2.5
"""Before each step. What the one before freed goes back from a virtual machine to its host within
seconds, and taking it again costs more than copying into it: all are to pay for that, or none."""

type Runs = dict[str, list[Measurement]]
"""Step -> its measurements, one per round."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and the folder that it makes, if it makes one."""

    name: str
    command: Sequence[str]
    made: Path | None = None


class Bench:
    """The steps of one model. `say` is told of each that is done."""

    def __init__(self, files: ModelFiles, say: Callable[[str], None]) -> None:
        self._files = files
        self._say = say
        root, name = files.root, files.case.name
        self._hf, self._megatron = files.folder, root / f"{name}-megatron"
        self._copy, self._imported, self._exported = (
            root / f"{name}-{made}" for made in ("copy", "imported", "exported")
        )

    def warm_up(self) -> Runs:
        """Every step once, in the order of the data: import, export, verify.

        The Megatron checkpoint stays. Raises BenchmarkError if one fails, or if what comes back
        from export is not, byte for byte, what was imported.
        """
        self.remove()
        first = self._run([self._import(self._megatron)], keep=True)
        steps = self._steps()
        export = next(step for step in steps if step.name == EXPORT)
        first |= self._run([export], keep=True)
        check_same(self._files.weights, self._hf, self._exported)
        self._tidy(export)
        return first | self._run([s for s in steps if s.name not in (IMPORT, EXPORT)])

    def round(self, number: int) -> Runs:
        """Every step once, in the order of this round. After `warm_up`."""
        return self._run(in_order(self._steps(), number))

    def megatron_bytes(self) -> int:
        """Bytes of the files of the Megatron checkpoint."""
        return sum((self._megatron / name).stat().st_size for name in self._megatron_files())

    def remove(self) -> None:
        """Remove everything but the model's own files."""
        for folder in (self._megatron, self._copy, self._imported, self._exported):
            _remove(folder)
            _remove(folder.with_name(f"{folder.name}.partial"))  # of a command that failed

    def _steps(self) -> list[Step]:
        hf, megatron = str(self._hf), str(self._megatron)
        imports = self._import(self._imported)
        exports = Step(
            EXPORT, _bridge(EXPORT, megatron, str(self._exported), "--hf", hf), self._exported
        )
        verifies = Step(VERIFY, _bridge(VERIFY, hf, megatron))
        if self._files.case.role == MEMORY:
            return [imports, exports, verifies]
        if self._files.case.role != SPEED:
            return [
                Step(TORCH, [sys.executable, "-c", "import torch; print({})"]),
                imports,
                exports,
                verifies,
            ]
        return [
            Step(COPY_HF, self._copying(hf), self._copy),
            imports,
            Step(COPY_MEGATRON, self._copying(megatron), self._copy),
            exports,
            verifies,
        ]

    def _import(self, target: Path) -> Step:
        return Step(IMPORT, _bridge(IMPORT, str(self._hf), str(target)), target)

    def _copying(self, source: str) -> list[str]:
        script = 'cp -R "$1" "$2" && sync && echo "{}"'
        return ["sh", "-c", script, "sh", source, str(self._copy)]

    def _megatron_files(self) -> list[str]:
        files = (path for path in self._megatron.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self._megatron)) for path in files)

    def _run(self, steps: Sequence[Step], *, keep: bool = False) -> Runs:
        runs: Runs = {}
        for step in steps:
            os.sync()
            time.sleep(SETTLE_SECONDS)
            measurement, document = run(step.command)
            _check_document(step, document)
            runs[step.name] = [measurement]
            self._say(
                f"{step.name}: {measurement.wall_seconds:.2f} s, "
                f"{measurement.peak_bytes / 2**20:.0f} MiB at most"
            )
            if not keep:
                self._tidy(step)
        return runs

    def _tidy(self, step: Step) -> None:
        if step.made is not None:
            _remove(step.made)


def beside(role: str, step: str) -> str | None:
    """The step that `step` is compared with in cases of this role."""
    if step not in COPY_OF or role == MEMORY:
        return None
    return COPY_OF[step] if role == SPEED else TORCH


def check_same(names: Sequence[str], original: Path, exported: Path) -> None:
    """Compare files of two folders byte for byte. Raises BenchmarkError if one differs."""
    for name in names:
        if not filecmp.cmp(original / name, exported / name, shallow=False):
            raise BenchmarkError(f"{name}: export does not give back what was imported")


def in_order[T](steps: Sequence[T], number: int) -> list[T]:
    """The steps in the order of round `number`."""
    first = number % len(steps)
    before, behind = steps[:first], steps[first + 1 :]
    others = [*behind, *before]
    return [steps[first], *(reversed(others) if number % 2 else others)]


def _bridge(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron.bridge", *arguments, "--json"]


def _check_document(step: Step, document: dict[str, Any]) -> None:
    if step.name == VERIFY and not document["identical"]:
        raise BenchmarkError("verify found the two sides to differ")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
