"""A conversion of four small files, as tests of unfinished targets run it."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.target.fingerprint import Fingerprint, SourceFile
from megatron.bridge.target.job import Job
from megatron.bridge.target.manifest import PieceKey
from megatron.bridge.target.partial import PartialFolder

SIZES = {"config.json": 11, "iter_1/a.bin": 70, "iter_1/b.bin": 64, "empty": 0}
PIECES = [
    PieceKey(name, offset, min(32, size - offset))
    for name, size in SIZES.items()
    for offset in range(0, size, 32)
]
SOURCE = Fingerprint((SourceFile("a.safetensors", 120, 34, "ab"),))
JOB = Job("import", {"experts": None}, {"source": SOURCE}, "00ff")


def content(piece: PieceKey) -> bytes:
    return bytes((7 * piece.offset + at + len(piece.file)) % 251 for at in range(piece.nbytes))


def write(partial: PartialFolder, count: int | None = None) -> list[PieceKey]:
    """Write the first `count` pieces that are missing; those that were written."""
    todo = list(partial.unfinished(PIECES))[:count]
    for piece in todo:
        path = partial.path / piece.file
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, SIZES[piece.file])
        os.pwrite(descriptor, content(piece), piece.offset)
        os.close(descriptor)
        partial.record(piece, zlib.crc32(content(piece)))
    return todo


def run(
    target: Path,
    work: Callable[[PartialFolder], object],
    job: Job = JOB,
    *,
    resume: bool = False,
    force: bool = False,
) -> int:
    """Do some work; bytes that were taken over."""
    with PartialFolder(target, job, SIZES, resume=resume, force=force) as partial:
        work(partial)
    return partial.resumed_bytes


def complete(partial: PartialFolder) -> None:
    write(partial)
    partial.commit()


def convert(target: Path, job: Job = JOB, *, resume: bool = False, force: bool = False) -> int:
    """A whole run; bytes that were taken over."""
    return run(target, complete, job, resume=resume, force=force)


def fail(
    target: Path,
    error: BaseException,
    count: int | None = 3,
    *,
    resume: bool = False,
    force: bool = False,
) -> None:
    """A run that writes `count` pieces and raises."""

    def work(partial: PartialFolder) -> None:
        write(partial, count)
        raise error

    with pytest.raises(type(error)):
        run(target, work, resume=resume, force=force)


def killed(target: Path, count: int = 3) -> None:
    """A run in a process of its own, killed after `count` pieces."""
    child = os.fork()
    if not child:
        try:
            with PartialFolder(target, JOB, SIZES) as partial:
                write(partial, count)
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
