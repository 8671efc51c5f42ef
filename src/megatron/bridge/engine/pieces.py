"""Output files as pieces: contiguous ranges whose size and place are known before a byte moves.

A file is a row of parts (a header, a block of a tensor); consecutive parts are grouped to pieces.
Any thread of any process can make and write any piece at any time, so the layout of the files does
not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import CheckpointError
from megatron.bridge.tensors.arrays import Array, array_over
from megatron.bridge.tensors.boxes import Box, box_shape, row_blocks, volume
from megatron.bridge.tensors.spec import TensorSpec

type FillTensor = Callable[[str, Box, Array], None]
"""``fill(name, box, out)``: one box of an output tensor into memory of its dtype.

The memory is contiguous, in the order of the box or with its last two axes swapped.
"""

PIECE_BYTES = 8 << 20
"""Long enough to keep a disk busy, short enough to stay in a processor's cache."""


class Part(Protocol):
    """Bytes of an output file that are made together."""

    @property
    def nbytes(self) -> int:
        """All its bytes."""

    @property
    def tensor_bytes(self) -> int:
        """How many of them are tensor data."""

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        """Write all bytes to `out`, which is as long."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A Part of bytes that are known already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    @property
    def tensor_bytes(self) -> int:
        return 0

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        out[:] = self.data


@dataclass(frozen=True, slots=True)
class TensorData:
    """A Part that is a box of a tensor: its elements in row-major order, little-endian."""

    name: str
    box: Box
    dtype: str

    @property
    def nbytes(self) -> int:
        return volume(self.box) * itemsize(self.dtype)

    @property
    def tensor_bytes(self) -> int:
        return self.nbytes

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        fill(self.name, self.box, array_over(out, box_shape(self.box), self.dtype))


def tensor_blocks(
    specs: Iterable[TensorSpec], max_bytes: int, rows_multiple: Mapping[str, int]
) -> Iterator[TensorData]:
    """Tensors one after the other, in blocks.

    Args:
        specs: the tensors.
        max_bytes: of a block; `row_blocks` says which may be longer.
        rows_multiple: tensors whose blocks begin at such a multiple of rows, by name (see
            `row_blocks`).
    """
    for spec in specs:
        rows = rows_multiple.get(spec.name, 1)
        for box in row_blocks(spec.shape, itemsize(spec.dtype), max_bytes, rows):
            yield TensorData(spec.name, box, spec.dtype)


@dataclass(frozen=True, slots=True)
class FileCopy:
    """A Part that is a range of another file."""

    path: Path
    offset: int
    nbytes: int

    @property
    def tensor_bytes(self) -> int:
        return 0

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        """Read the range into `out`, which is as long.

        Raises:
            CheckpointError: the file cannot be read or has become shorter.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                offset = self.offset
                while out:
                    count = os.preadv(descriptor, [out], offset)
                    if not count:
                        raise CheckpointError(f"{self.path}: it was cut while it was copied")
                    out, offset = out[count:], offset + count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class OutputFile:
    """One file, by its path relative to the output folder, with "/" between folders."""

    name: str
    parts: tuple[Part, ...]

    @classmethod
    def of_bytes(cls, name: str, content: bytes, piece_bytes: int = PIECE_BYTES) -> OutputFile:
        """A file whose content is known already."""
        cuts = range(0, len(content), piece_bytes)
        return cls(name, tuple(Literal(content[at : at + piece_bytes]) for at in cuts))

    @classmethod
    def copy_of(cls, name: str, path: Path, piece_bytes: int = PIECE_BYTES) -> OutputFile:
        """A copy of a file as long as that is now. Raises CheckpointError if it cannot be found."""
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        cuts = range(0, size, piece_bytes)
        return cls(name, tuple(FileCopy(path, at, min(piece_bytes, size - at)) for at in cuts))

    @cached_property
    def nbytes(self) -> int:
        """The length of the file."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous range of a file, and the parts that it is made of."""

    file: str
    offset: int
    nbytes: int
    parts: tuple[Part, ...]

    @property
    def tensor_bytes(self) -> int:
        """How many bytes of it are tensor data."""
        return sum(part.tensor_bytes for part in self.parts)

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        """Write all bytes to `out`, which is as long."""
        position = 0
        for part in self.parts:
            part.write_to(out[position : position + part.nbytes], fill)
            position += part.nbytes


def pieces_of(file: OutputFile, piece_bytes: int) -> Iterator[Piece]:
    """Consecutive parts, as many as fit into `piece_bytes`; a longer part is a piece of its own."""
    offset = size = 0
    parts: list[Part] = []
    for part in file.parts:
        nbytes = part.nbytes
        if parts and size + nbytes > piece_bytes:
            yield Piece(file.name, offset, size, tuple(parts))
            offset, size, parts = offset + size, 0, []
        parts.append(part)
        size += nbytes
    if parts:
        yield Piece(file.name, offset, size, tuple(parts))
