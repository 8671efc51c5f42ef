"""The streaming engine: threads that each make a piece of an output file and write it.

A thread fills its own buffer from the source, which is reused from piece to piece, and writes it
to its place. While one thread reads, another writes. Memory is a buffer and scratch
space for each thread, whatever the size of the model, its tensors and its files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from megatron.bridge.engine.piece_writer import PieceBuffer, PieceWriter
from megatron.bridge.engine.pieces import PIECE_BYTES, FillTensor, OutputFile, Piece, pieces_of
from megatron.bridge.engine.worker_threads import share_out
from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.slice_reader import SCRATCH_BYTES
from megatron.bridge.progress import Progress, Silent

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
    def of(cls, memory: int = DEFAULT_MEMORY, longest_piece: int = 0) -> Budget:
        """Spend `memory` bytes: on shorter pieces than usual only where it is very small.

        longest_piece: in bytes, where pieces are laid out already. Raises InputError if the memory
        is too small for one thread.
        """
        least = SCRATCH_BYTES + _BUFFERS * max(_SMALLEST_PIECE, longest_piece)
        if memory < least:
            raise InputError(
                f"memory (--memory): {memory} bytes are too small; give {least} or more"
            )
        # While one waits for the disk, the others keep the processors busy.
        wanted = min(_MOST_THREADS, (os.cpu_count() or 1) + 1)
        piece_bytes = max(PIECE_BYTES, longest_piece)
        threads = min(wanted, max(1, memory // (SCRATCH_BYTES + _BUFFERS * piece_bytes)))
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
    A file is flushed to the disk when the last of its `pieces` is written. Raises CheckpointError
    if a file cannot be written, and whatever `fill` raises; KeyboardInterrupt ends all threads.
    """
    pieces = list(pieces)
    writer = PieceWriter(folder, {file.name: file.nbytes for file in files}, pieces)
    lock = threading.Lock()

    def work(mine: Iterator[Piece]) -> None:
        import torch

        torch.set_num_threads(1)  # of this thread: the pieces are what runs in parallel
        buffer = PieceBuffer(budget.piece_bytes)
        for piece in mine:
            out = buffer.room_for(piece)
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
