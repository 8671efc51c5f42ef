"""A target of `import` or `export` against its manifest: what was written is there, unchanged.

Only the target is read, and of the source no more than tells that it is the one that the manifest
records, and what the target shares blocks with. That what was written is what should have been is
not looked at again.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.engine import DEFAULT_MEMORY
from megatron.bridge.engine.stream import Budget
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.formats.iterations import (
    METADATA_FILE,
    Iteration,
    is_megatron_checkpoint,
    is_megatron_folder,
    iteration_folder,
)
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.verification.file_ranges import TensorPlaces
from megatron.bridge.operations.verification.report import (
    ConvertedFrom,
    FastReport,
    FileDifference,
    Files,
    Format,
)
from megatron.bridge.paths import local_path
from megatron.bridge.progress import Progress
from megatron.bridge.target.checksums import check_files
from megatron.bridge.target.fingerprint import Fingerprint, SourceFile
from megatron.bridge.target.record import MANIFEST_FILE, Record, read_manifest
from megatron.bridge.text.quoting import quoted
from megatron.bridge.text.sizes import format_bytes

_KINDS: dict[str, tuple[Format, Format]] = {
    "import": ("huggingface", "megatron"),
    "export": ("megatron", "huggingface"),
}
"""What a command reads and what it writes."""

_SOURCE = "source"
"""The name that manifests give to what was converted."""


def verify_fast(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    *,
    iteration: Iteration | None = None,
    memory: int = DEFAULT_MEMORY,
) -> FastReport:
    """Read the files of a target again and compare them with the checksums in its manifest.

    A file of the source that was modified since counts as a difference, even if it holds the same
    bytes. Differences are in the report.

    Args:
        a: the target, or what it was converted from.
        b: the other one of the two; without it no source is looked at.
        progress: told of the bytes that are read.
        iteration: of a source that is a Megatron checkpoint.
        memory: as in `verify`.

    Raises:
        InputError: no side is a target with a manifest, or a source cannot be found, or is needed
            and not given.
        CheckpointError: a manifest cannot be read.
    """
    begin = time.perf_counter()
    budget = Budget.of(memory)
    target, source, changes = _assigned(a, b, iteration)
    reads, writes = _KINDS[target.manifest.job.command]
    unread = sum(file.unread_bytes for file in target.manifest.files)
    if unread and source is None:
        raise InputError(
            f"{target.name}: {format_bytes(unread)} of it are blocks of the files that it was "
            "converted from, which nobody has read: they have no checksums; name the source, too, "
            "or verify without --fast"
        )
    # What differs from files that changed says nothing of the target.
    beside = None if source is None or changes else _source_folder(target, source, iteration)
    faults = check_files(target.folder, target.manifest, progress, budget.threads, beside)
    seconds = time.perf_counter() - begin
    places = TensorPlaces(target.folder)
    return FastReport(
        target=Files(target.name, writes),
        converted_from=None if source is None else ConvertedFrom(source, reads, changes),
        files=len(target.manifest.files),
        bytes=target.manifest.nbytes,
        different=[
            FileDifference(file, offset, nbytes, problem, places.tensors_in(file, offset, nbytes))
            for file, offset, nbytes, problem in faults
        ],
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Target:
    name: str
    folder: Path
    manifest: Record

    @property
    def recorded(self) -> Fingerprint:
        """The fingerprint of what it was converted from."""
        return self.manifest.job.sources[_SOURCE]

    def reads(self, source: str | os.PathLike[str]) -> bool:
        """Whether it was converted from something of this kind."""
        folder = local_path(source)
        if self.source_kind == "megatron":
            return is_megatron_checkpoint(folder)
        return not is_megatron_folder(folder)

    @property
    def source_kind(self) -> str:
        """What it was converted from: "megatron" or "huggingface"."""
        return _KINDS[self.manifest.job.command][0]


def _assigned(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None,
    iteration: Iteration | None,
) -> tuple[_Target, str | None, list[str]]:
    """The target, its source, and how that is not the one that is recorded."""
    if b is None:
        if target := _target(a):
            return target, None, []
        raise _no_manifest(os.fspath(a))
    found = [
        (target, os.fspath(source), _changes(target, source, iteration))
        for side, source in ((b, a), (a, b))
        if (target := _target(side))
    ]
    if not found:
        raise _no_manifest(f"{os.fspath(a)}, {os.fspath(b)}")
    # A checkpoint that was imported and then exported has a manifest, and so has what came of it.
    return min(found, key=lambda one: len(one[2]))


def _no_manifest(where: str) -> InputError:
    return InputError(
        f"{where}: there is no {MANIFEST_FILE}, as import and export --keep-manifest leave it, so "
        "no checksums to compare with; verify against the source without --fast"
    )


def _target(reference: str | os.PathLike[str]) -> _Target | None:
    """A folder with a manifest; of a Megatron checkpoint also the folder of an iteration."""
    folder = local_path(reference)
    for candidate in (folder, folder.absolute().parent):
        if manifest := read_manifest(candidate):
            command, sources = manifest.job.command, manifest.job.sources
            if command not in _KINDS or _SOURCE not in sources:
                raise CheckpointError(
                    f"{candidate / MANIFEST_FILE}: it is of {quoted(command)}, which this version "
                    "does not know; verify without --fast"
                )
            return _Target(os.fspath(reference), candidate, manifest)
        if not (folder / METADATA_FILE).is_file():
            break
    return None


def _changes(
    target: _Target, source: str | os.PathLike[str], iteration: Iteration | None
) -> list[str]:
    """How a source differs from the one that is recorded, file by file."""
    if not target.reads(source):
        megatron = target.source_kind == "megatron"
        return [f"it is a {'Hugging Face model' if megatron else 'Megatron checkpoint'}"]
    return _differences(target.recorded, _source_folder(target, source, iteration))


def _source_folder(
    target: _Target, source: str | os.PathLike[str], iteration: Iteration | None
) -> Path:
    """Where the files of a source lie that is of the right kind."""
    if target.source_kind == "megatron":
        return iteration_folder(local_path(source), iteration)
    return PreTrainedVLM.from_pretrained(source).weights_folder


def _differences(recorded: Fingerprint, folder: Path) -> list[str]:
    seen = []
    for file in recorded.files:
        try:
            seen.append(SourceFile.of(folder, file.name))
        except FileNotFoundError:
            continue  # reported as missing
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return Fingerprint(tuple(seen)).changed_since(recorded)
