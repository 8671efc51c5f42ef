"""The unfinished target of a conversion: `<target>.partial`, until it is complete.

    with PartialFolder(target, job, sizes, resume=True) as partial:
        for piece in partial.unfinished(pieces):
            ...                                        # write it below partial.path
            partial.record(piece, crc32)
        partial.commit(lambda: check_unchanged(source))

However a run ends, by an error, a kill or a power cut, it leaves nothing, a `.partial` that a later
run can resume, or the target. A target is complete when its manifest is written; the journals go
next, then the folder is renamed. From the first of these on, Ctrl-C and SIGTERM come too late.

Several processes share one: the first makes, resumes and commits it; all write and record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron.bridge.target.journal import Journal, Ranged, read_journals

from megatron.bridge.errors import (
    CheckpointError,
    InexactCast,
    InputError,
    MismatchError,
    PlanError,
    SourceChanged,
)
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target import unfinished
from megatron.bridge.target.folder_lock import FolderLock
from megatron.bridge.target.folder_sync import sync, sync_all
from megatron.bridge.target.interruption import uninterrupted
from megatron.bridge.target.job import Job
from megatron.bridge.target.manifest import (
    JOURNAL_FOLDER,
    MANIFEST_FILE,
    Manifest,
    PieceKey,
    is_output_name,
)
from megatron.bridge.target.processes import Processes, ProcessFailed
from megatron.bridge.target.targets import check_target, partial_of, put_in_place

_FINAL = (SourceChanged, MismatchError, PlanError, InexactCast)
"""After these nothing that was written can be part of a right target."""

_STOP_SECONDS = 10.0


class PartialFolder:
    """Files that become `target` together. Makes no file itself, but the empty ones.

    sizes: bytes of every output file by its name, "/" between folders. resume: go on with what a
    run of the same job left, if there is any. force: replace the target at the end; without
    `resume` also what a run left. keep_manifest: leave it in the target. progress: of reading back
    what is there, after a restart.

    Entering raises TargetExists, FolderBusy, and InputError: if an unfinished target is there and
    neither is given, if it was begun as another job (with the differences), or if the file system
    has not enough room.
    """

    def __init__(
        self,
        target: Path,
        job: Job,
        sizes: Mapping[str, int],
        *,
        processes: Processes | None = None,
        resume: bool = False,
        force: bool = False,
        keep_manifest: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self._target = target.absolute()
        self.path = partial_of(self._target)
        """The folder to write into."""
        self.finished: Mapping[PieceKey, int] = {}
        """Pieces that earlier runs wrote, with their CRC-32; the same in all processes."""
        self._job = job
        self._sizes = sizes
        self._processes = processes or Processes()
        self._resume = resume
        self._force = force
        self._keep_manifest = keep_manifest
        self._progress = progress or Silent()
        self._lock: FolderLock | None = None
        self._journal: Journal | None = None
        self._is_complete = False

    @property
    def resumed_bytes(self) -> int:
        """Of the output: those that need not be written again."""
        return sum(key.nbytes for key in self.finished)

    def unfinished[P: Ranged](self, pieces: Iterable[P]) -> Iterator[P]:
        """Those of `pieces` that are still to be written."""
        for piece in pieces:
            if (piece.file, piece.offset, piece.nbytes) not in self.finished:
                yield piece

    def __enter__(self) -> Self:
        try:
            self._processes.first_does(self._begin)
            self._processes.together(self._join)
        except BaseException as error:
            self._end(error)
            raise
        return self

    def record(self, piece: Ranged, crc32: int) -> None:
        """Say that a piece is written. Thread-safe; raises ProcessFailed if another one failed."""
        self._processes.check()
        if self._journal is None:
            raise RuntimeError("a piece was recorded outside of the block")
        self._journal.record(piece, crc32)

    def commit(self, check: Callable[[], None] | None = None) -> None:
        """Let the target appear, when all processes have come here.

        check: called by the first when everything is written; what it raises ends the run. Raises
        CheckpointError if a piece is missing or a file is not as long as it should be, TargetExists
        if the target was made meanwhile.
        """
        held = self._lock
        if held is None or self._journal is None:
            raise RuntimeError("commit was called outside of the block")
        self._processes.together(self._leave)
        self._processes.first_does(lambda: self._complete(held, check))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Without `commit`: keep what can be resumed, and say so in a note to the error."""
        self._end(error)

    # --- the first process ---

    def _begin(self) -> None:
        check_target(self._target, [], force=self._force)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        there = os.path.lexists(self.path)
        if there and self._resume:
            self._lock, self.finished = unfinished.take_over(
                self.path, self._job, self._sizes, self._progress
            )
        elif there:
            self._remove_old()
        self._check_room()
        if self._lock is None:
            self._lock = unfinished.make(self.path, self._job)
        if self._processes.size > 1:
            try:
                self._lock.share()
            except BaseException:  # now it is somebody else's
                self._lock.close()
                self._lock = None
                raise

    def _remove_old(self) -> None:
        complete = unfinished.is_complete(self.path)
        lock = unfinished.lock(self.path)
        try:
            if not self._force:
                raise InputError(f"{self.path} is what an earlier run left; {unfinished.CHOICES}")
            if complete:
                raise InputError(
                    f"{self.path} is complete; give it its name with --resume (resume=True), or "
                    "remove it yourself"
                )
            unfinished.remove(self.path, lock)
        finally:
            lock.close()

    def _check_room(self) -> None:
        have: dict[str, int] = dict.fromkeys(self._sizes, 0)
        for key in self.finished:
            have[key.file] += key.nbytes
        needed = sum(
            nbytes - min(nbytes, max(have[name], _allocated(self.path / name)))
            for name, nbytes in self._sizes.items()
        )
        system = os.statvfs(self.path if self.path.exists() else self._target.parent)
        free = system.f_bavail * system.f_frsize
        if needed > free:
            raise InputError(
                f"{self._target.parent}: {needed:,} bytes are to be written, {free:,} are free; "
                "make room, or choose a target on another file system"
            )

    def _complete(self, held: FolderLock, check: Callable[[], None] | None) -> None:
        if check is not None:
            check()
        manifest = Manifest.of(self._job, self._sizes, self._all_pieces())
        self._check_files()
        new = self.path / JOURNAL_FOLDER / "manifest"
        new.write_text(manifest.to_text(), encoding="utf-8")
        sync_all([new, *(self.path / name for name in self._sizes), *self._folders()])
        check_target(self._target, [], force=self._force)
        # Whoever finds no journal any more is kept out by the lock on the manifest.
        manifest_lock = FolderLock(new)
        try:
            with uninterrupted():
                new.rename(self.path / MANIFEST_FILE)
                self._is_complete = True
                sync(self.path)
                unfinished.remove_journals(self.path, held)
                put_in_place(
                    self.path,
                    self._target,
                    force=self._force,
                    but=() if self._keep_manifest else (MANIFEST_FILE,),
                )
        finally:
            manifest_lock.close()

    def _folders(self) -> list[Path]:
        return [Path(folder) for folder, _, _ in os.walk(self.path)]

    def _all_pieces(self) -> dict[PieceKey, int]:
        pieces: dict[PieceKey, int] = {}
        for journal in read_journals(self.path):
            pieces |= {key: crc for key, crc in journal.pieces.items() if key.file in self._sizes}
        return pieces

    def _check_files(self) -> None:
        """Make the empty files; raise CheckpointError unless there are exactly the right files."""
        # Listing a folder first: a file system of a network may remember files as absent.
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.path).as_posix()
                if name not in self._sizes and is_output_name(name):
                    raise CheckpointError(f"{path}: this is no file of the target; remove it")
        for name, nbytes in self._sizes.items():
            path = self.path / name
            if not nbytes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            found = path.stat().st_size if path.is_file() else 0
            if found != nbytes:
                raise CheckpointError(
                    f"{path}: it should have {nbytes} bytes and has {found}: it was changed while "
                    "it was written"
                )

    # --- every process ---

    def _join(self) -> None:
        if not self._processes.is_first:
            self._lock, self.finished = unfinished.join(self.path, self._job)
        path = unfinished.journal_path(self.path, self._processes.rank)
        self._journal = Journal(path, self._job)

    def _leave(self) -> None:
        """This process has done its part. The first keeps its lock: it still works here."""
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None and not self._processes.is_first:
            self._lock.close()

    def _end(self, error: BaseException | None) -> None:
        self._leave()
        if error is not None:
            self._processes.fail(error)
        if self._lock is not None and self._processes.is_first:
            try:
                self._keep_or_remove(self._lock, error)
            except OSError as problem:
                if error is None:
                    raise
                error.add_note(f"{self.path} could not be removed: {problem}")
            finally:
                self._lock.close()

    def _keep_or_remove(self, lock: FolderLock, error: BaseException | None) -> None:
        wasted = not self._is_complete and self._is_wasted(error)
        if wasted and self._processes.all_stopped(_STOP_SECONDS) and self._is_wasted(error):
            unfinished.remove(self.path, lock)
        elif error is not None and self.path.is_dir():
            error.add_note(f"what is finished was kept in {self.path}; {unfinished.CHOICES}")

    def _is_wasted(self, error: BaseException | None) -> bool:
        return _is_final(error) or not unfinished.is_worth_keeping(self.path)


def _is_final(error: BaseException | None) -> bool:
    if isinstance(error, ProcessFailed):
        names = {kind.__name__ for kind in _FINAL}
        return any(failure.kind in names for failure in error.failures)
    return isinstance(error, _FINAL)


def _allocated(path: Path) -> int:
    """Bytes that a file takes on the disk already; 0 if there is none."""
    return path.stat().st_blocks * 512 if path.is_file() else 0
