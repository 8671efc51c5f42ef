"""A target that is made in `<target>.partial`, and can be resumed file by file.

    with ResumableFolder(target, job, sizes, resume=True) as folder:
        for file in files:
            if file.name not in folder.finished:
                ...                                # write it below folder.path, and to the disk
                folder.add(FileRecord(...))
        folder.commit(lambda: check_unchanged(source))

However a run ends, by an error, a kill or a power cut, it leaves nothing, a `.partial` that a later
run can resume, or the target. From the moment that the record is complete, Ctrl-C and SIGTERM come
too late.

Several processes share one: the first makes, resumes and commits it; all write and record.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron.bridge.errors import (
    CheckpointError,
    InexactCast,
    InputError,
    MismatchError,
    PlanError,
    SourceChanged,
)
from megatron.bridge.target.folder_lock import FolderBusy, FolderLock
from megatron.bridge.target.folder_sync import sync, sync_all
from megatron.bridge.target.interruption import uninterrupted
from megatron.bridge.target.job import Job
from megatron.bridge.target.processes import Processes, ProcessFailed
from megatron.bridge.target.record import (
    MANIFEST_FILE,
    FileRecord,
    RecordWriter,
    is_output_name,
    read_records,
    record_path,
    remove_other_records,
    write_new_record,
)
from megatron.bridge.target.targets import check_target, partial_of, publish

_USELESS_AFTER = (SourceChanged, MismatchError, PlanError, InexactCast)
"""After these errors nothing that was written can be part of a right target."""

WORTH_KEEPING = 64 << 20
"""Bytes: less is done again in a moment, and should not be in the way of the next run."""

_CHOICES = "go on with --resume (resume=True), or start again with --force (force=True)"

_APPEARS_SECONDS = 60.0
"""So late may another machine see a folder: file systems of a network remember what is absent."""


class ResumableFolder:
    """Files that become `target` together. It makes no file itself but the empty ones.

    Args:
        target: where it is to appear.
        job: what makes it.
        sizes: bytes of every file by its name, with "/" between folders.
        shared: how many of these take no room on the disk.
        processes: those that share the work.
        resume: go on with what a run of the same job left, if there is any.
        force: replace the target at the end; without `resume` also what a run left.
        keep_manifest: leave the manifest in the target.
    """

    def __init__(
        self,
        target: Path,
        job: Job,
        sizes: Mapping[str, int],
        *,
        shared: Mapping[str, int] | None = None,
        processes: Processes | None = None,
        resume: bool = False,
        force: bool = False,
        keep_manifest: bool = True,
    ) -> None:
        self._target = target.absolute()
        self.path = partial_of(self._target)
        """The folder to write into."""
        self.finished: Collection[str] = frozenset()
        """Files that earlier runs finished; the same in all processes."""
        self._job = job
        self._sizes = sizes
        self._shared = shared or {}
        self._processes = processes or Processes()
        self._resume = resume
        self._force = force
        self._keep_manifest = keep_manifest
        self._lock: FolderLock | None = None
        self._record: RecordWriter | None = None
        self._is_complete = False

    @property
    def resumed_bytes(self) -> int:
        """Bytes of the files that earlier runs finished."""
        return sum(self._sizes[name] for name in self.finished)

    def __enter__(self) -> Self:
        """Make the folder to write into, or go on with that of an earlier run.

        Raises:
            TargetExists: the target is there and is not to be replaced.
            FolderBusy: another run works in the folder.
            InputError: an unfinished target is there and neither `resume` nor `force` is given; or
                it was begun as another job, and the message lists the differences; or the file
                system has not enough room.
            CheckpointError: the record of the unfinished target cannot be read.
        """
        try:
            job, self.finished = self._processes.run_on_first(self._begin)
            self._processes.run_on_all(lambda: self._join(job))
        except BaseException as error:
            self._end(error)
            raise
        return self

    def add(self, file: FileRecord) -> None:
        """Say that a file is on the disk. Thread-safe; raises OSError."""
        if self._record is None:
            raise RuntimeError("a file was recorded outside of the block")
        self._record.add(file)

    def commit(self, check: Callable[[], None] | None = None) -> None:
        """Let the target appear, when all processes have come here.

        Args:
            check: called by the first when everything is written; what it raises ends the run.

        Raises:
            CheckpointError: a file is missing or not as long as it should be.
            TargetExists: the target was made meanwhile.
        """
        if self._lock is None or self._record is None:
            raise RuntimeError("commit was called outside of the block")
        self._processes.run_on_all(self._stop_writing)
        self._processes.run_on_first(lambda: self._complete(check))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Without `commit`: keep what can be resumed, and say so in a note to the error."""
        self._end(error)

    # --- the first process ---

    def _begin(self) -> tuple[Job, Collection[str]]:
        check_target(self._target, [], force=self._force)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        old = _lock(self.path) if os.path.lexists(self.path) else None
        finished: Mapping[str, FileRecord] = {}
        try:
            if old is not None and self._resume:
                finished = self._finished_before()
            elif old is not None:
                self._remove_old(old)
            self._check_room(finished)
            if old is not None and self._resume:
                lock = self._write_record(self.path, finished.values())
                remove_other_records(self.path)
            else:
                lock = self._make()
        finally:
            if old is not None:
                old.close()
        if self._processes.size > 1:
            lock.share()
        self._lock = lock
        return self._job, frozenset(finished)

    def _finished_before(self) -> Mapping[str, FileRecord]:
        records = read_records(self.path)
        if not records:
            raise CheckpointError(
                f"{self.path}: its record cannot be read; start again with --force (force=True)"
            )
        differences = [line for record in records for line in self._job.differences(record.job)]
        if differences:
            raise InputError.of_problems(
                f"{self.path} was begun as another conversion; resume it as it was begun, or start "
                "again with --force (force=True)",
                dict.fromkeys(differences),
            )
        for name in self._sizes:
            if (self.path / name).is_symlink():  # what it leads to is not the target's
                (self.path / name).unlink()
        return {
            file.name: file
            for record in records
            for file in record.files
            if self._sizes.get(file.name) == file.nbytes == _size(self.path / file.name)
        }

    def _remove_old(self, lock: FolderLock) -> None:
        if not self._force:
            raise InputError(f"{self.path} is what an earlier run left; {_CHOICES}")
        if any(record.complete for record in read_records(self.path)):
            raise InputError(
                f"{self.path} is complete; give it its name with --resume (resume=True), or remove "
                "it yourself"
            )
        _remove(self.path, lock)

    def _check_room(self, finished: Collection[str]) -> None:
        needed = sum(
            max(0, nbytes - max(self._shared.get(name, 0), _allocated(self.path / name)))
            for name, nbytes in self._sizes.items()
            if name not in finished
        )
        system = os.statvfs(self._target.parent)
        free = system.f_bavail * system.f_frsize
        if needed > free:
            raise InputError(
                f"{self._target.parent}: {needed:,} bytes are to be written, {free:,} are free; "
                "make room, or choose a target on another file system"
            )

    def _make(self) -> FolderLock:
        """Make the folder, which appears with its record and locked: no state of it is unknown."""
        new = _hidden(self.path)
        new.mkdir()
        try:
            lock = self._write_record(new, ())
            new.rename(self.path)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, OSError) and os.path.lexists(self.path):
                raise FolderBusy(f"{self.path} was made by another run meanwhile") from error
            raise
        sync(self.path.parent)
        return lock

    def _write_record(
        self, folder: Path, files: Iterable[FileRecord], *, complete: bool = False
    ) -> FolderLock:
        """Put a new record in the place of the old one; a lock on it, which other runs respect."""
        path = folder / MANIFEST_FILE
        new = write_new_record(path, self._job, files, complete=complete)
        lock = FolderLock(new)
        try:
            new.replace(path)
            sync(folder)
        except BaseException:
            lock.close()
            raise
        return lock

    def _complete(self, check: Callable[[], None] | None) -> None:
        if check is not None:
            check()
        files = self._check_files()
        sync_all(Path(folder) for folder, _, _ in os.walk(self.path))
        check_target(self._target, [], force=self._force)
        before = self._lock
        with uninterrupted():
            self._lock = self._write_record(self.path, files, complete=True)
            self._is_complete = True
            if before is not None:
                before.close()
            remove_other_records(self.path)
            publish(
                self.path,
                self._target,
                force=self._force,
                without=() if self._keep_manifest else (MANIFEST_FILE,),
            )

    def _check_files(self) -> list[FileRecord]:
        """Make the empty files; the records of all, if there are exactly the right ones."""
        # Listing a folder first: a file system of a network may remember files as absent.
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.path).as_posix()
                if name not in self._sizes and is_output_name(name):
                    raise CheckpointError(f"{path}: this is no file of the target; remove it")
        files = {file.name: file for record in read_records(self.path) for file in record.files}
        for name, nbytes in self._sizes.items():
            path = self.path / name
            if not nbytes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                sync(path)
                files[name] = FileRecord(name, ())
            if name not in files:
                raise CheckpointError(f"{path}: it was not written to its end; run it again")
            if not nbytes == files[name].nbytes == _size(path):
                raise CheckpointError(
                    f"{path}: it should have {nbytes} bytes and has {_size(path) or 0}: it was "
                    "changed while it was written"
                )
        return [files[name] for name in self._sizes]

    # --- every process ---

    def _join(self, job: Job) -> None:
        rank = self._processes.rank
        if not self._processes.is_first:
            _wait_for(self.path)
            self._lock = FolderLock(self.path / MANIFEST_FILE, shared=True)
            if differences := self._job.differences(job):
                raise InputError.of_problems(
                    f"{self.path}: this process sees another conversion than process 0", differences
                )
            path = record_path(self.path, rank)
            write_new_record(path, self._job, (), complete=False).replace(path)
        self._record = RecordWriter(record_path(self.path, rank))

    def _stop_writing(self) -> None:
        """This process has done its part. The first keeps its lock: it still works here."""
        if self._record is not None:
            self._record.close()
        if self._lock is not None and not self._processes.is_first:
            self._lock.close()

    def _end(self, error: BaseException | None) -> None:
        self._stop_writing()
        all_stopped = error is None or self._processes.stop(error)
        if self._lock is not None and self._processes.is_first:
            try:
                if all_stopped and self._is_useless(error):
                    _remove(self.path, self._lock)
                elif error is not None and self.path.is_dir():
                    error.add_note(f"what is finished was kept in {self.path}; {_CHOICES}")
            except OSError as problem:
                if error is None:
                    raise
                error.add_note(f"{self.path} could not be removed: {problem}")
            finally:
                self._lock.close()

    def _is_useless(self, error: BaseException | None) -> bool:
        if self._is_complete:
            return False
        if isinstance(error, ProcessFailed):
            names = {kind.__name__ for kind in _USELESS_AFTER}
            useless = any(failure.kind in names for failure in error.failures)
        else:
            useless = isinstance(error, _USELESS_AFTER)
        return useless or sum(record.nbytes for record in read_records(self.path)) < WORTH_KEEPING


def _lock(partial: Path) -> FolderLock:
    """Lock a folder that is there. Raises FolderBusy, or InputError if no run has made it."""
    try:
        return FolderLock(partial / MANIFEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{partial} is in the way: it is not what an unfinished conversion leaves; remove it "
            "yourself, or choose another target"
        ) from None


def _wait_for(partial: Path) -> None:
    end = time.monotonic() + _APPEARS_SECONDS
    while not (partial / MANIFEST_FILE).exists():
        if time.monotonic() > end:
            raise InputError(
                f"{partial} was made by process 0 and cannot be seen here; all processes need the "
                "same file system"
            )
        time.sleep(0.1)
        if partial.parent.is_dir():
            next(partial.parent.iterdir(), None)  # what is absent is looked for again


def _remove(partial: Path, lock: FolderLock) -> None:
    """Remove the folder, and give up the lock on it. It can be resumed until it is gone."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif is_output_name(path.name):
            path.unlink()
    # Some file systems do not remove files that are open, and the lock is one.
    gone = _hidden(partial)
    partial.rename(gone)
    lock.close()
    shutil.rmtree(gone)


def _hidden(partial: Path) -> Path:
    return partial.with_name(f".{partial.name}-{secrets.token_hex(4)}")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _allocated(path: Path) -> int:
    """Bytes that a file takes on the disk already; 0 if there is none."""
    return path.stat().st_blocks * 512 if path.is_file() else 0
