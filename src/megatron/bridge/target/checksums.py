"""Reading files back and comparing them with recorded checksums, at the speed of the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from isal.isal_zlib import crc32

from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.record import Record

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
    folder: Path, manifest: Record, progress: Progress | None = None, workers: int = WORKERS
) -> list[Fault]:
    """Read every file of a manifest and compare its pieces with their CRC-32.

    Args:
        folder: where the files lie; those that the manifest does not name are not looked at.
        manifest: what they should be.
        progress: is told of a task "checksums" of all bytes that are read.
        workers: threads, each with 1 MiB of memory.

    Returns:
        The differences, sorted by file and place.
    """
    faults = []
    pieces = []
    for file in manifest.files:
        if problem := _size_fault(folder / file.name, file.nbytes):
            faults.append(Fault(file.name, 0, file.nbytes, problem))
            continue
        offset = 0
        for nbytes, crc in file.pieces:
            pieces.append((file.name, offset, nbytes, crc))
            offset += nbytes
    shown = progress or Silent()
    shown.start("checksums", sum(nbytes for _, _, nbytes, _ in pieces))
    lock = threading.Lock()

    def work(own: Iterator[tuple[str, int, int, int]]) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        for name, offset, nbytes, expected in own:
            problem = _piece_fault(folder / name, offset, nbytes, expected, buffer)
            with lock:
                if problem:
                    faults.append(Fault(name, offset, nbytes, problem))
                shown.advance(nbytes)

    run_in_threads(pieces, work, workers)
    return sorted(faults)


def _size_fault(path: Path, nbytes: int) -> str | None:
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found is None:
        return "missing"
    return None if found == nbytes else f"size {found}, expected {nbytes}"


def _piece_fault(
    path: Path, offset: int, nbytes: int, expected: int, buffer: memoryview
) -> str | None:
    try:
        descriptor = os.open(path, _READ_ONLY)
        try:
            found, position, end = 0, offset, offset + nbytes
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
