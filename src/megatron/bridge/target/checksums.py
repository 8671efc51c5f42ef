"""Reading files back and comparing them with recorded checksums, at the speed of the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from isal.isal_zlib import crc32

from megatron.bridge.engine.worker_threads import share_out
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.manifest import Manifest, PieceKey

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


def check_files(
    folder: Path, manifest: Manifest, progress: Progress | None = None, workers: int = WORKERS
) -> list[Fault]:
    """Read every file of a manifest; the differences, sorted by file and place.

    Files that the manifest does not name are not looked at. Memory: 1 MiB for each worker.
    """
    faults = []
    sound = set()
    for file in manifest.files:
        if problem := _size_fault(folder / file.name, file.nbytes):
            faults.append(Fault(file.name, 0, file.nbytes, problem))
        else:
            sound.add(file.name)
    pieces = [(key, crc) for key, crc in manifest.pieces() if key.file in sound]
    return sorted(faults + check_pieces(folder, pieces, progress, workers))


def check_pieces(
    folder: Path,
    pieces: Iterable[tuple[PieceKey, int]],
    progress: Progress | None = None,
    workers: int = WORKERS,
) -> list[Fault]:
    """Read pieces and compare them with their CRC-32; the differences, sorted.

    progress: a task "checksums" of all their bytes.
    """
    pieces = list(pieces)
    shown = progress or Silent()
    shown.start("checksums", sum(key.nbytes for key, _ in pieces))
    faults: list[Fault] = []
    lock = threading.Lock()

    def work(mine: Iterator[tuple[PieceKey, int]]) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        for key, expected in mine:
            problem = _piece_fault(folder, key, expected, buffer)
            with lock:
                if problem:
                    faults.append(Fault(*key, problem))
                shown.advance(key.nbytes)

    share_out(pieces, work, workers)
    return sorted(faults)


def _size_fault(path: Path, nbytes: int) -> str | None:
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found is None:
        return "missing"
    return None if found == nbytes else f"size {found}, expected {nbytes}"


def _piece_fault(folder: Path, key: PieceKey, expected: int, buffer: memoryview) -> str | None:
    try:
        descriptor = os.open(folder / key.file, _READ_ONLY)
        try:
            found, position, end = 0, key.offset, key.offset + key.nbytes
            while position < end:
                count = os.preadv(descriptor, [buffer[: end - position]], position)
                if not count:
                    return f"the file ends at byte {position}"
                found = crc32(buffer[:count], found)
                position += count
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == expected else f"CRC-32 {found:08x}, expected {expected:08x}"
