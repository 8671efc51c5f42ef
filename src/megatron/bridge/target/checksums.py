"""Reading files back and comparing them with recorded checksums, at the speed of the disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from isal.isal_zlib import crc32

from megatron.bridge.engine.pieces import PIECE_BYTES
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.errors import CheckpointError
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.record import (
    CheckedRange,
    FileRecord,
    Record,
    RecordedRange,
    UnreadRange,
)

WORKERS = 4
_BLOCK_BYTES = 1 << 20
"""Read at once: stays in a processor's cache until its checksum is taken."""

_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would wait for a writer


class Fault(NamedTuple):
    """A range of a file that is not what it should be, and why; offset and nbytes in bytes."""

    file: str
    offset: int
    nbytes: int
    problem: str


class _Place(NamedTuple):
    """A recorded range, and where in which file of the target it begins."""

    file: str
    offset: int
    recorded: RecordedRange


def check_files(
    folder: Path,
    manifest: Record,
    progress: Progress | None = None,
    workers: int = WORKERS,
    source: Path | None = None,
) -> list[Fault]:
    """Read every file of a manifest and compare its pieces with their CRC-32.

    Ranges without one are compared with those of the source whose blocks they are.

    Args:
        folder: where the files lie; those that the manifest does not name are not looked at.
        manifest: what they should be.
        progress: is told of a task "checksums" of all bytes of the target that are read.
        workers: threads, each with 2 MiB of memory.
        source: the folder of the source; without it, ranges that have no CRC-32 are passed over.

    Returns:
        The differences, sorted by file and place.
    """
    faults: list[Fault] = []
    places: list[_Place] = []
    for file in manifest.files:
        if problem := _size_fault(folder / file.name, file.nbytes):
            faults.append(Fault(file.name, 0, file.nbytes, problem))
        else:
            places += _places(file)

    def check(place: _Place, buffers: _Buffers) -> None:
        path, recorded = folder / place.file, place.recorded
        try:
            if isinstance(recorded, CheckedRange):
                found = _crc32(path, place.offset, recorded.nbytes, buffers)
                equal, problem = (
                    found == recorded.crc,
                    f"CRC-32 {found:08x}, expected {recorded.crc:08x}",
                )
            elif source is not None:
                equal = _is_range_of(path, place.offset, recorded, source, buffers)
                problem = f"not the bytes of {recorded.file}, whose blocks it had"
            else:
                return
        except OSError as error:
            equal, problem = False, f"cannot be read: {error.strerror}"
        if not equal:
            faults.append(Fault(place.file, place.offset, recorded.nbytes, problem))

    _for_each(places, check, progress, workers)
    return sorted(faults)


def with_checksums(
    folder: Path,
    files: Iterable[FileRecord],
    progress: Progress | None = None,
    workers: int = WORKERS,
) -> list[FileRecord]:
    """The records with a CRC-32 for each range, taken now where there is none.

    Args:
        folder: where the files lie.
        files: what is recorded of them.
        progress: as of `check_files`.
        workers: as of `check_files`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = [_in_pieces(file) for file in files]
    taken: dict[tuple[str, int], CheckedRange] = {}

    def take(place: _Place, buffers: _Buffers) -> None:
        path, nbytes = folder / place.file, place.recorded.nbytes
        try:
            crc = _crc32(path, place.offset, nbytes, buffers)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        taken[place.file, place.offset] = CheckedRange(nbytes, crc)

    places = [place for file in files for place in _places(file)]
    unread = [place for place in places if isinstance(place.recorded, UnreadRange)]
    _for_each(unread, take, progress, workers)
    return [
        FileRecord(
            file.name,
            tuple(
                taken.get((file.name, offset), recorded) for _, offset, recorded in _places(file)
            ),
        )
        for file in files
    ]


type _Buffers = tuple[memoryview, memoryview]


def _for_each(
    places: list[_Place],
    work_on: Callable[[_Place, _Buffers], None],
    progress: Progress | None,
    workers: int,
) -> None:
    """Call a function for each range, from several threads."""
    shown = progress or Silent()
    shown.start("checksums", sum(place.recorded.nbytes for place in places))
    lock = threading.Lock()

    def work(own: Iterator[_Place]) -> None:
        buffers = memoryview(bytearray(_BLOCK_BYTES)), memoryview(bytearray(_BLOCK_BYTES))
        for place in own:
            work_on(place, buffers)
            with lock:
                shown.advance(place.recorded.nbytes)

    run_in_threads(places, work, workers)


def _places(file: FileRecord) -> Iterator[_Place]:
    offset = 0
    for recorded in file.pieces:
        yield _Place(file.name, offset, recorded)
        offset += recorded.nbytes


def _in_pieces(file: FileRecord) -> FileRecord:
    """With ranges that have no checksum not longer than others are."""
    return FileRecord(file.name, tuple(part for piece in file.pieces for part in _parts(piece)))


def _parts(piece: RecordedRange) -> Iterator[RecordedRange]:
    if isinstance(piece, CheckedRange):
        yield piece
        return
    for at in range(0, piece.nbytes, PIECE_BYTES):
        nbytes = min(PIECE_BYTES, piece.nbytes - at)
        yield UnreadRange(nbytes, piece.offset + at, piece.file)


def _size_fault(path: Path, nbytes: int) -> str | None:
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found is None:
        return "missing"
    return None if found == nbytes else f"size {found}, expected {nbytes}"


def _crc32(path: Path, offset: int, nbytes: int, buffers: _Buffers) -> int:
    crc = 0
    with _opened(path) as descriptor:
        for block in _blocks(descriptor, offset, nbytes, buffers[0]):
            crc = crc32(block, crc)
    return crc


def _is_range_of(
    path: Path, offset: int, recorded: UnreadRange, source: Path, buffers: _Buffers
) -> bool:
    """Whether a range holds the bytes of that of the source whose blocks it got."""
    nbytes, begin, name = recorded
    with _opened(path) as target, _opened(source / name) as other:
        ours = _blocks(target, offset, nbytes, buffers[0])
        theirs = _blocks(other, begin, nbytes, buffers[1])
        return all(one == two for one, two in zip(ours, theirs, strict=True))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, _READ_ONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _blocks(descriptor: int, offset: int, nbytes: int, buffer: memoryview) -> Iterator[memoryview]:
    """A range of a file, block by block in the same memory. Raises OSError if it ends before."""
    end = offset + nbytes
    while offset < end:
        block = buffer[: min(len(buffer), end - offset)]
        filled = 0
        while filled < len(block):
            count = os.preadv(descriptor, [block[filled:]], offset + filled)
            if not count:
                raise OSError(errno.EIO, f"the file ends at byte {offset + filled}")
            filled += count
        yield block
        offset += len(block)
