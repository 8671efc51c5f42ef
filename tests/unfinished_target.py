"""A conversion of four small files, as tests of unfinished targets run it."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.target.fingerprint import Fingerprint, SourceFile
from megatron.bridge.target.folder import ResumableFolder
from megatron.bridge.target.job import Job
from megatron.bridge.target.record import CheckedRange, FileRecord

SIZES = {"config.json": 11, "iter_1/a.bin": 70, "iter_1/b.bin": 64, "empty": 0}
FILES = [name for name, size in SIZES.items() if size]
SOURCE = Fingerprint((SourceFile("a.safetensors", 120, 34, "ab"),))
JOB = Job("import", {"experts": None}, {"source": SOURCE}, "00ff")


def content(name: str) -> bytes:
    return bytes((7 * at + len(name)) % 251 for at in range(SIZES[name]))


def record(name: str) -> FileRecord:
    """With pieces of 32 bytes."""
    parts = [content(name)[at : at + 32] for at in range(0, SIZES[name], 32)]
    return FileRecord(name, tuple(CheckedRange(len(part), zlib.crc32(part)) for part in parts))


def write(folder: ResumableFolder, count: int | None = None) -> list[str]:
    """Write the first `count` files that are missing, and begin the next one; the first ones."""
    todo = [name for name in FILES if name not in folder.finished]
    for number, name in enumerate(todo):
        path = folder.path / name
        path.parent.mkdir(exist_ok=True)
        whole = content(name)
        if number == count:
            path.write_bytes(whole[:9] + bytes(len(whole) - 9))
            break
        path.write_bytes(whole)
        folder.add(record(name))
    return todo[:count]


def run(
    target: Path,
    work: Callable[[ResumableFolder], object],
    job: Job = JOB,
    *,
    resume: bool = False,
    force: bool = False,
) -> int:
    """Do some work; bytes that were taken over."""
    with ResumableFolder(target, job, SIZES, resume=resume, force=force) as folder:
        work(folder)
    return folder.resumed_bytes


def complete(folder: ResumableFolder) -> None:
    write(folder)
    folder.commit()


def convert(target: Path, job: Job = JOB, *, resume: bool = False, force: bool = False) -> int:
    """A whole run; bytes that were taken over."""
    return run(target, complete, job, resume=resume, force=force)


def fail(
    target: Path,
    error: BaseException,
    count: int | None = 2,
    *,
    resume: bool = False,
    force: bool = False,
) -> None:
    """A run that writes `count` files and raises."""

    def work(folder: ResumableFolder) -> None:
        write(folder, count)
        raise error

    with pytest.raises(type(error)):
        run(target, work, resume=resume, force=force)


def killed(target: Path, count: int = 2) -> None:
    """A run in a process of its own, killed after `count` files."""
    child = os.fork()
    if not child:
        try:
            with ResumableFolder(target, JOB, SIZES) as folder:
                write(folder, count)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
