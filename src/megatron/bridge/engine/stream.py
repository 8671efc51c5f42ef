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

from megatron.bridge.engine import DEFAULT_MEMORY
from megatron.bridge.engine.piece_writer import Checksums, PieceBuffer, PieceWriter
from megatron.bridge.engine.pieces import PIECE_BYTES, FillTensor, OutputFile, Piece, pieces_of
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.slice_reader import SCRATCH_BYTES, read_once
from megatron.bridge.progress import Progress, Silent

_MOST_THREADS = 8
_BUFFERS = 3
"""Memory of one thread, in pieces: the piece, and two more where elements are computed."""

_SMALLEST_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class Budget:
    """How a memory budget is spent: threads, and the length of a piece in bytes."""

    threads: int
    piece_bytes: int

    @classmethod
    def of(cls, memory: int = DEFAULT_MEMORY, longest_piece: int = 0) -> Budget:
        """Spend `memory` bytes: on shorter pieces than usual only where it is very small.

        Args:
            memory: bytes that the buffers of all threads may take together.
            longest_piece: in bytes, where pieces are laid out already.

        Raises:
            InputError: the memory is too small for one thread.
        """
        least = SCRATCH_BYTES + _BUFFERS * max(_SMALLEST_PIECE, longest_piece)
        if memory < least:
            raise InputError(
                f"memory (--memory): {memory} bytes are too small; give {least} or more"
            )
        # While those of one half wait for the disk, the others keep the processors busy.
        wanted = min(_MOST_THREADS, 2 * (os.cpu_count() or 1) + 2)
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
    on_file: Callable[[str, Checksums], None],
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write `pieces`, which tile some or all of `files`.

    Args:
        folder: exists; files below it are made where they are missing.
        files: those that the pieces belong to, perhaps more.
        pieces: of each file all or none.
        fill: makes the tensors; called by several threads.
        budget: threads, and the length of their buffers.
        on_file: told of each file that is complete and on the disk; by several threads.
        progress: told of the bytes of tensors.
        check: called before each piece; what it raises ends all threads.

    Raises:
        CheckpointError: a file cannot be written.
        BaseException: whatever `fill`, `on_file` and `check` raise, and KeyboardInterrupt; all
            threads have ended then.
    """
    pieces = list(pieces)
    writer = PieceWriter(folder, {file.name: file.nbytes for file in files}, pieces)
    lock = threading.Lock()

    def work(own: Iterator[Piece]) -> None:
        read_once()
        buffer = PieceBuffer(budget.piece_bytes)
        for piece in own:
            check()
            out = buffer.room_for(piece)
            piece.write_to(out, fill)
            checksums = writer.write(piece, out)
            if checksums is not None:
                on_file(piece.file, checksums)
            with lock:
                progress.advance(piece.tensor_bytes)

    with writer:
        run_in_threads(pieces, work, budget.threads)


def write_files(
    folder: Path,
    files: Sequence[OutputFile],
    fill: FillTensor,
    progress: Progress | None = None,
) -> None:
    """Write all of some files into an existing folder, with the default budget and no record."""
    budget, shown = Budget.of(), progress or Silent()
    pieces = [piece for file in files for piece in pieces_of(file, budget.piece_bytes)]
    shown.start("save", sum(piece.tensor_bytes for piece in pieces))
    write_pieces(folder, files, pieces, fill, budget, on_file=lambda *_: None, progress=shown)
    for file in files:
        if not file.parts:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).touch()
