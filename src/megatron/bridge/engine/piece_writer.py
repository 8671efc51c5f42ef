"""Writing pieces to their places in output files, past the page cache where the system lets it.

Whoever writes through the cache pays for memory that nobody asked for: the kernel finds and clears
new pages, copies into them, and throws out what others had there. A direct write takes the bytes
from the buffer to the disk. It has to begin and end with a page, in the file and in memory; the
ends of a piece, each shorter than a page, go through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from isal.isal_zlib import crc32

from megatron.bridge.engine.pieces import Piece
from megatron.bridge.errors import CheckpointError

_DIRECT: int | None = getattr(os, "O_DIRECT", None)
"""None where the system has no such flag."""

_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)
"""What a file system says of direct writes that it does not have."""

_LEAST_DIRECT = 64 << 10
"""Bytes below which a disk is waited for longer than the cache takes."""


type Checksums = tuple[tuple[int, int], ...]
"""(bytes, CRC-32) of the pieces of a file, in order."""


class PieceBuffer:
    """Memory of one thread for one piece after the other; grows to the longest one.

    Args:
        nbytes: length of the longest piece that is expected.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._memory = memoryview(b"")

    def room_for(self, piece: Piece) -> memoryview:
        """As many bytes as the piece has, lying in a page as they will lie in a page of the file.

        Anything may be left in them of the pieces before.
        """
        begin = piece.offset % mmap.PAGESIZE
        if begin + piece.nbytes > len(self._memory):
            nbytes = max(piece.nbytes, self._nbytes) + mmap.PAGESIZE
            # Not bytearray: it begins anywhere in a page.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory = memoryview(mmap.mmap(-1, nbytes, flags=flags))
        return self._memory[begin : begin + piece.nbytes]


class _OpenFile:
    """One output file, of its full length, until its last piece is written.

    Attributes:
        cached: descriptor for writing through the cache.
        direct: descriptor for direct writes; None where the file system has none.
        written: (offset, bytes, CRC-32) of the pieces so far.
        lock: one thread at a time writes through the cache. The kernel lets no two, and those that
            wait there burn time.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.written: list[tuple[int, int, int]] = []
        self.cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.direct: int | None = None
        try:
            os.ftruncate(self.cached, nbytes)
            self.direct = _open_direct(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.direct is not None:
            os.close(self.direct)
        os.close(self.cached)


class PieceWriter:
    """Output files, each open from its first piece to its last. Safe to use from several threads.

    Args:
        folder: where the files lie.
        sizes: their lengths in bytes, by name.
        pieces: all that will be written.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], pieces: Iterable[Piece]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._pieces = Counter(piece.file for piece in pieces)
        self._files: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()

    def write(self, piece: Piece, data: memoryview) -> Checksums | None:
        """Write a piece, whose bytes lie in a PieceBuffer, to its place.

        With its last piece, a file is flushed to the disk.

        Returns:
            After the last piece of a file, all its checksums.

        Raises:
            CheckpointError: the file cannot be written.
        """
        path = self._folder / piece.file
        try:
            file = self._open(piece.file, path)
            begin = min(-piece.offset % mmap.PAGESIZE, len(data))
            end = begin + (len(data) - begin) // mmap.PAGESIZE * mmap.PAGESIZE
            if end - begin >= _LEAST_DIRECT:
                end = begin + _write_direct(file, data[begin:end], piece.offset + begin)
            else:
                end = begin
            with file.lock:
                _write_all(file.cached, data[:begin], piece.offset)
                _write_all(file.cached, data[end:], piece.offset + end)
            if not self._is_last(file, piece, crc32(data)):
                return None
            # With this descriptor: another one may not be told of a write that failed.
            os.fsync(file.cached)
            self._files.pop(piece.file).close()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        return tuple((nbytes, crc) for _, nbytes, crc in sorted(file.written) if nbytes)

    def _open(self, name: str, path: Path) -> _OpenFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = _OpenFile(path, self._sizes[name])
            return self._files[name]

    def _is_last(self, file: _OpenFile, piece: Piece, crc: int) -> bool:
        """Note a written piece of a file; whether all of them are."""
        with self._lock:
            file.written.append((piece.offset, piece.nbytes, crc))
            return len(file.written) == self._pieces[piece.file]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Files are still open only if an error is on its way; closing has nothing to add to it."""
        while self._files:
            with suppress(OSError):
                self._files.popitem()[1].close()


def _open_direct(path: Path) -> int | None:
    if _DIRECT is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise


def _write_direct(file: _OpenFile, data: memoryview, offset: int) -> int:
    """Write whole pages past the cache; returns how many of the bytes could be written so."""
    done = 0
    while file.direct is not None and done < len(data):
        try:
            done += _write_some(file.direct, data[done:], offset + done)
        except OSError as error:
            # The disk's blocks are longer than pages, or the write before ended inside of one.
            if error.errno in _UNSUPPORTED:
                break
            raise
    return done


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = _write_some(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _write_some(descriptor: int, data: memoryview, offset: int) -> int:
    count = os.pwrite(descriptor, data, offset)
    if not count:  # a server of files that is out of order; trying again would not end
        raise OSError(errno.EIO, "nothing is written any more")
    return count
