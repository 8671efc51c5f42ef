"""The folder of an unfinished target: making it, taking over what a killed run left, removing it.

    <target>.partial/
        .megatron-bridge/lock               held by every process that works here
        .megatron-bridge/finished.jsonl     the job; what earlier runs finished of it
        .megatron-bridge/process-00001.jsonl    what this run finished, by process
        .megatron-bridge.json               the manifest: all files are complete and on the disk
        ...                                 the target's files

It is one of ours if it has the journal folder, or the manifest: between the removal of the one and
the renaming there is a moment when only the other is left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.progress import Progress
from megatron.bridge.target.checksums import check_pieces
from megatron.bridge.target.folder_lock import FolderBusy, FolderLock
from megatron.bridge.target.folder_sync import sync
from megatron.bridge.target.job import Job
from megatron.bridge.target.journal import Recorded, boot_id, read_journals, write_journal
from megatron.bridge.target.manifest import (
    JOURNAL_FOLDER,
    MANIFEST_FILE,
    PieceKey,
    read_manifest,
)

_LOCK = f"{JOURNAL_FOLDER}/lock"
_FINISHED = f"{JOURNAL_FOLDER}/finished.jsonl"
_APPEARS_SECONDS = 60.0
"""So late may another machine see a folder: file systems of a network remember what is absent."""

WORTH_KEEPING = 64 << 20
"""Bytes: less is done again in a moment, and should not be in the way of the next run."""

CHOICES = "go on with --resume (resume=True), or start again with --force (force=True)"


def make(partial: Path, job: Job) -> FolderLock:
    """Make the folder and lock it. It appears as a whole, so that no state of it is unknown.

    Raises InputError if it is there.
    """
    new = _hidden(partial)
    (new / JOURNAL_FOLDER).mkdir(parents=True)
    try:
        (new / _LOCK).touch()
        held = FolderLock(new / _LOCK)
        write_journal(new / _FINISHED, job, {})
        sync(new)
        new.rename(partial)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) and os.path.lexists(partial):
            raise FolderBusy(f"{partial} was made by another run meanwhile") from error
        raise
    sync(partial.parent)
    return held


def lock(partial: Path) -> FolderLock:
    """Lock a folder that is there. Raises FolderBusy, or InputError if it is none of ours."""
    journals, manifest = partial / JOURNAL_FOLDER, partial / MANIFEST_FILE
    if journals.is_dir() and not manifest.exists():
        (partial / _LOCK).touch()  # a run that was killed while it removed this
    held = _lock_if_there(partial / _LOCK)
    try:
        # A run that commits holds the manifest, and has let go of the journals.
        complete = _lock_if_there(manifest)
    except BaseException:
        if held is not None:
            held.close()
        raise
    if held is not None:
        if complete is not None:
            complete.close()
        return held
    if complete is not None:
        return complete
    raise InputError(
        f"{partial} is in the way: it is not what an unfinished conversion leaves; remove it "
        "yourself, or choose another target"
    )


def _lock_if_there(path: Path) -> FolderLock | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return FolderLock(path)
    return None


def join(partial: Path, job: Job) -> tuple[FolderLock, Mapping[PieceKey, int]]:
    """Share the folder that another process of this run has made or taken over.

    Also what earlier runs finished. Raises InputError if it cannot be seen from here, or if this
    process sees another job.
    """
    end = time.monotonic() + _APPEARS_SECONDS
    while not (partial / _LOCK).exists():
        if time.monotonic() > end:
            raise InputError(
                f"{partial} was made by process 0 and cannot be seen here; all processes need the "
                "same file system"
            )
        time.sleep(0.1)
        if partial.parent.is_dir():
            next(partial.parent.iterdir(), None)  # what is absent is looked for again
    held = FolderLock(partial / _LOCK, shared=True)
    known = Recorded.read(partial / _FINISHED)
    differences = job.differences(known.job) if known else ["its journal cannot be read"]
    if known is None or differences:
        held.close()
        raise InputError.of_problems(
            f"{partial}: this process sees another conversion than process 0", differences
        )
    return held, known.pieces


def take_over(
    partial: Path, job: Job, sizes: Mapping[str, int], progress: Progress
) -> tuple[FolderLock, dict[PieceKey, int]]:
    """Lock the folder; what earlier runs finished, with CRC-32, after it was checked.

    sizes: of the output files in bytes. After a restart of the machine every piece is read back.
    Raises FolderBusy, InputError if it is none of ours or of another job.
    """
    held = lock(partial)
    try:
        before = _recorded(partial)
        _refuse_another(partial, job, before)
        finished: dict[PieceKey, int] = {}
        for known in before:
            present = _present(partial, known.pieces, sizes)
            if known.boot is None or known.boot != boot_id():
                for fault in check_pieces(partial, present.items(), progress):
                    del present[PieceKey(*fault[:3])]
            finished |= present
        if not (partial / _LOCK).exists():
            (partial / JOURNAL_FOLDER).mkdir(exist_ok=True)
            (partial / _LOCK).touch()
            held.close()
            held = FolderLock(partial / _LOCK)
        write_journal(partial / _FINISHED, job, finished)
        for path in (partial / JOURNAL_FOLDER).iterdir():
            if path not in (partial / _LOCK, partial / _FINISHED):
                path.unlink()
        (partial / MANIFEST_FILE).unlink(missing_ok=True)
    except BaseException:
        held.close()
        raise
    return held, finished


def _recorded(partial: Path) -> list[Recorded]:
    manifest = read_manifest(partial)
    if manifest is not None:  # written when all pieces were on the disk: as good as now
        return [Recorded(manifest.job, boot_id() or "", dict(manifest.pieces()))]
    if found := read_journals(partial):
        return found
    raise CheckpointError(
        f"{partial}: what is finished cannot be read; start again with --force (force=True)"
    )


def _refuse_another(partial: Path, job: Job, before: list[Recorded]) -> None:
    differences = {line: None for known in before for line in job.differences(known.job)}
    if differences:
        raise InputError.of_problems(
            f"{partial} was begun as another conversion; resume it as it was begun, or start again "
            f"with --force (force=True)",
            differences,
        )


def _present(
    partial: Path, pieces: Mapping[PieceKey, int], sizes: Mapping[str, int]
) -> dict[PieceKey, int]:
    """Those that lie in files which are long enough."""
    found = {}
    for name in {key.file for key in pieces} & sizes.keys():
        path = partial / name
        found[name] = min(sizes[name], path.stat().st_size if path.is_file() else 0)
    return {
        key: crc for key, crc in pieces.items() if key.offset + key.nbytes <= found.get(key.file, 0)
    }


def journal_path(partial: Path, rank: int) -> Path:
    """The journal of a process."""
    return partial / JOURNAL_FOLDER / f"process-{rank:05d}.jsonl"


def is_worth_keeping(partial: Path) -> bool:
    """Whether so much is finished that a later run should not do it again."""
    if (partial / MANIFEST_FILE).exists():
        return True
    return sum(key.nbytes for j in read_journals(partial) for key in j.pieces) >= WORTH_KEEPING


def is_complete(partial: Path) -> bool:
    """Whether it lacks nothing but its name."""
    return not (partial / JOURNAL_FOLDER).is_dir()


def remove(partial: Path, held: FolderLock) -> None:
    """Remove the folder, and give up the lock on it. It is one of ours until it is gone."""
    (partial / MANIFEST_FILE).unlink(missing_ok=True)
    for path in partial.iterdir():
        if path.name == JOURNAL_FOLDER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    # Some file systems do not remove files that are open, and the lock is one.
    gone = _hidden(partial)
    partial.rename(gone)
    held.close()
    shutil.rmtree(gone)


def remove_journals(partial: Path, held: FolderLock) -> None:
    """When the manifest is there, and locked, they have done their duty, and so has their lock."""
    held.close()
    shutil.rmtree(partial / JOURNAL_FOLDER)
    sync(partial)


def _hidden(partial: Path) -> Path:
    return partial.with_name(f".{partial.name}-{secrets.token_hex(4)}")
