"""Parts and pieces of output files, written without the engine or by threads of a test."""

import threading
from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.engine.piece_writer import PieceBuffer, PieceWriter
from megatron.bridge.engine.pieces import FillTensor, Part, Piece

THREADS = 3


def content_of(parts: Sequence[Part], fill: FillTensor = lambda *_: None) -> bytes:
    """The bytes of parts that follow each other; `fill` makes those of tensors."""
    out = bytearray(sum(part.nbytes for part in parts))
    position = 0
    for part in parts:
        part.write_to(memoryview(out)[position : position + part.nbytes], fill)
        position += part.nbytes
    return bytes(out)


def write_in_threads(
    folder: Path, names: Sequence[str], content: bytes, pieces: Sequence[Piece], longest: int
) -> None:
    """Write pieces of files that all have this content; each thread takes every third one."""

    def work(own: Sequence[Piece]) -> None:
        buffer = PieceBuffer(longest)
        for piece in own:
            data = buffer.room_for(piece)
            data[:] = content[piece.offset : piece.offset + piece.nbytes]
            writer.write(piece, data)

    with PieceWriter(folder, dict.fromkeys(names, len(content)), pieces) as writer:
        threads = [
            threading.Thread(target=work, args=(pieces[turn::THREADS],)) for turn in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def flip_a_bit(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
