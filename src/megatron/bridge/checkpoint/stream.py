"""The streaming engine: threads that each make a piece of an output file and write it.

A thread fills its own buffer from the source, which is reused from piece to piece, and writes it
to its place with one call. While one thread reads, another writes. Memory is a buffer and scratch
space for each thread, whatever the size of the model, its tensors and its files.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from isal.isal_zlib import crc32

from megatron.bridge.checkpoint.pieces import PIECE_BYTES, FillTensor, OutputFile, Piece, pieces_of
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained.slice_reader import SCRATCH_BYTES
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.worker_threads import share_out

DEFAULT_MEMORY = 1 << 30
"""Bytes that buffers may take together."""

_MOST_THREADS = 8
_BUFFERS = 3
"""Of one thread, in pieces: the piece, and as much again where elements are computed."""

_SMALLEST_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class Budget:
    """How a memory budget is spent: threads, and the length of a piece in bytes."""

    threads: int
    piece_bytes: int

    @classmethod
    def of(cls, memory: int = DEFAULT_MEMORY) -> Budget:
        """Spend `memory` bytes: on shorter pieces than usual only where it is very small.

        Raises InputError if it is too small for one thread.
        """
        least = SCRATCH_BYTES + _BUFFERS * _SMALLEST_PIECE
        if memory < least:
            raise InputError(
                f"a memory budget of {memory} bytes is too small; give {least} or more"
            )
        wanted = min(_MOST_THREADS, max(2, os.cpu_count() or 1))
        threads = min(wanted, max(1, memory // (SCRATCH_BYTES + _BUFFERS * PIECE_BYTES)))
        piece_bytes = min(PIECE_BYTES, (memory // threads - SCRATCH_BYTES) // _BUFFERS)
        return cls(threads, piece_bytes)


def write_pieces(
    folder: Path,
    files: Sequence[OutputFile],
    pieces: Iterable[Piece],
    fill: FillTensor,
    budget: Budget,
    *,
    record: Callable[[Piece, int], None],
    progress: Progress,
) -> None:
    """Write `pieces`, some or all of those of `files`, into files of their full length.

    folder: exists; files below it are made where they are missing. fill: called by several
    threads. record: told of each piece that is written, with its CRC-32; by several threads.
    Files are not flushed to the disk. Raises CheckpointError if a file cannot be written, and
    whatever `fill` raises; KeyboardInterrupt ends all threads.
    """
    writer = _Writer(folder, {file.name: file.nbytes for file in files})
    lock = threading.Lock()

    def work(mine: Iterator[Piece]) -> None:
        import torch

        torch.set_num_threads(1)  # of this thread: the pieces are what runs in parallel
        buffer = memoryview(b"")
        for piece in mine:
            # The kernel copies page by page, and fastest between equal places in a page.
            begin = piece.offset % mmap.PAGESIZE
            if begin + piece.nbytes > len(buffer):
                buffer = _pages(max(piece.nbytes, budget.piece_bytes))
            out = buffer[begin : begin + piece.nbytes]
            piece.write_to(out, fill)
            writer.write(piece, out)
            record(piece, crc32(out))
            with lock:
                progress.advance(piece.tensor_bytes)

    with writer:
        share_out(pieces, work, budget.threads)


def write_files(folder: Path, files: Sequence[OutputFile], fill: FillTensor) -> None:
    """Write all of some files into an existing folder, with the default budget and no record."""
    budget = Budget.of()
    pieces = (piece for file in files for piece in pieces_of(file, budget.piece_bytes))
    write_pieces(folder, files, pieces, fill, budget, record=lambda *_: None, progress=Silent())
    for file in files:
        if not file.parts:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).touch()


def _pages(nbytes: int) -> memoryview:
    """Memory that begins with a page, and has room for so many bytes from any place in it on."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, nbytes + mmap.PAGESIZE, flags=flags))


class _OpenFile(NamedTuple):
    """One thread at a time writes: the kernel lets no two, and those that wait there burn time."""

    descriptor: int
    lock: threading.Lock


class _Writer:
    """Output files, opened when they are first written to. Safe to use from several threads."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._files: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()

    def write(self, piece: Piece, data: memoryview) -> None:
        path = self._folder / piece.file
        try:
            file, offset = self._open(piece.file, path), piece.offset
            with file.lock:
                while data:
                    count = os.pwrite(file.descriptor, data, offset)
                    data, offset = data[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error

    def _open(self, name: str, path: Path) -> _OpenFile:
        with self._lock:
            if name not in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._files[name] = _OpenFile(descriptor, threading.Lock())
                os.ftruncate(descriptor, self._sizes[name])
            return self._files[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1].descriptor)
