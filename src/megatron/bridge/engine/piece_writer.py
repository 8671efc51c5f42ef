"""Writing pieces to their places in output files: past the page cache, or through it if that wins.

Whoever writes through the cache pays for memory that nobody asked for: the kernel finds and clears
new pages, copies into them, and throws out what others had there. A direct write takes the bytes
from the buffer to the disk. It has to begin and end with a page, in the file and in memory. The
ends of a piece, each shorter than a page, go through the cache, when all else of the file is
written: the kernel lets nothing through it while direct writes to the file are on their way, and
lets none of these begin while something waits for that.

There are disks and file systems to which the cache is the faster way all the same; a trial finds
out (`write_trial.py`). What goes through the cache is then sent to the disk at once and dropped
when it is there, so that its pages are used again.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from isal.isal_zlib import crc32

from megatron.bridge.engine.pieces import Piece
from megatron.bridge.engine.write_trial import WriteTrial
from megatron.bridge.errors import CheckpointError
from megatron.bridge.file_hints import finish_writing, forget, reserve, start_writing

_DIRECT: int | None = getattr(os, "O_DIRECT", None)
"""None where the system has no such flag."""

_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)
"""What a file system says of direct writes that it does not have."""

_LEAST_DIRECT = 64 << 10
"""Bytes below which a disk is waited for longer than the cache takes."""

_BEHIND = 64 << 20
"""Bytes of a file that may be on their way from the cache to the disk."""


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
            memory = mmap.mmap(-1, nbytes, flags=flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # Requests to the disk become longer; half the kernel's time for them is saved.
                with suppress(OSError):
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory = memoryview(memory)
        return self._memory[begin : begin + piece.nbytes]


class _OpenFile:
    """One output file, of its full length, until its last piece is written.

    Its blocks are reserved, if all of it will be written: a direct write to where a file has none
    waits for those beside it, and a disk that is too small is known before it is full.

    Attributes:
        cached: descriptor for writing through the cache.
        direct: descriptor for direct writes; None where the file system has none.
        written: (offset, bytes, CRC-32) of the pieces so far.
        ends: (offset, bytes) of what is shorter than a page and still to be written.
        behind: (offset, bytes) of what is on its way from the cache to the disk, oldest first.
        lock: one thread at a time writes through the cache. The kernel lets no two, and those that
            wait there burn time.
    """

    def __init__(self, path: Path, nbytes: int, *, whole: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.nbytes = nbytes
        self.lock = threading.Lock()
        self.ends: list[tuple[int, bytes]] = []
        self.behind: deque[tuple[int, int]] = deque()
        self.written: list[tuple[int, int, int]] = []
        self.cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.direct: int | None = None
        try:
            os.ftruncate(self.cached, nbytes)
            if whole:
                reserve(self.cached, nbytes)
            self.direct = _open_direct(path)
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Have all of it on the disk; of a long file that went through the cache, nothing there."""
        for offset, data in _joined(self.ends):
            write_all(self.cached, memoryview(data), offset)
        # With this descriptor: another one may not be told of a write that failed.
        os.fsync(self.cached)
        if self.behind and self.nbytes > _BEHIND:
            forget(self.cached)

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
        self._pieces: Counter[str] = Counter()
        self._nbytes: Counter[str] = Counter()
        for piece in pieces:
            self._pieces[piece.file] += 1
            self._nbytes[piece.file] += piece.nbytes
        self._trial = WriteTrial(self._nbytes.total())
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
            self._put(file, data, piece.offset)
            if not self._is_last(file, piece, crc32(data)):
                return None
            file.finish()
            self._files.pop(piece.file).close()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        return tuple((nbytes, crc) for _, nbytes, crc in sorted(file.written) if nbytes)

    def _open(self, name: str, path: Path) -> _OpenFile:
        with self._lock:
            if name not in self._files:
                size = self._sizes[name]
                self._files[name] = _OpenFile(path, size, whole=self._nbytes[name] == size)
                if self._files[name].direct is None:
                    self._trial.decide(direct=False)
            return self._files[name]

    def _put(self, file: _OpenFile, data: memoryview, offset: int) -> None:
        if len(data) < _LEAST_DIRECT:
            _write_short(file, data, offset)
            return
        direct, on_trial = self._trial.way(len(data))
        began = time.perf_counter()
        if direct:
            done = _write_past(file, data, offset)
        else:
            done = _write_through(file, data, offset, wait=on_trial)
        if on_trial and done:
            self._trial.note(direct, len(data), time.perf_counter() - began)
        elif on_trial:
            self._trial.decide(not direct)

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


def _write_short(file: _OpenFile, data: memoryview, offset: int) -> None:
    with file.lock:
        write_all(file.cached, data, offset)


def _write_past(file: _OpenFile, data: memoryview, offset: int) -> bool:
    """Write whole pages past the cache, and keep the ends; False if the pages went through it."""
    begin = min(-offset % mmap.PAGESIZE, len(data))
    whole = begin + (len(data) - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    end = begin
    while file.direct is not None and end < whole:
        try:
            end += _write_some(file.direct, data[end:whole], offset + end)
        except OSError as error:
            # The disk's blocks are longer than pages, or the write before ended inside of one.
            if error.errno in _UNSUPPORTED:
                break
            raise
    file.ends.append((offset, bytes(data[:begin])))
    if end == whole:
        file.ends.append((offset + end, bytes(data[end:])))
        return True
    with file.lock:
        write_all(file.cached, data[end:], offset + end)
    return False


def _write_through(file: _OpenFile, data: memoryview, offset: int, *, wait: bool) -> bool:
    """Write through the cache, and let the disk begin; False if the kernel will not begin yet.

    Args:
        file: to write to.
        data: to write.
        offset: where.
        wait: until these bytes are on the disk, not only until not too many are on their way.
    """
    most = 0 if wait else _BEHIND
    late: list[tuple[int, int]] = []
    with file.lock:
        write_all(file.cached, data, offset)
        file.behind.append((offset, len(data)))
        while sum(nbytes for _, nbytes in file.behind) > most:
            late.append(file.behind.popleft())
    begun = start_writing(file.cached, offset, len(data))
    for range_ in late:
        finish_writing(file.cached, *range_)
        forget(file.cached, *range_)
    return begun


def _joined(ends: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Ends of pieces, (offset, bytes), in order; those that touch are one."""
    begin, data = 0, b""
    for offset, more in sorted(ends):
        if offset != begin + len(data):
            yield begin, data
            begin, data = offset, b""
        data += more
    yield begin, data


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write to a place in a file, however many calls that takes. Raises OSError."""
    while data:
        count = _write_some(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _write_some(descriptor: int, data: memoryview, offset: int) -> int:
    count = os.pwrite(descriptor, data, offset)
    if not count:  # a server of files that is out of order; trying again would not end
        raise OSError(errno.EIO, "nothing is written any more")
    return count
