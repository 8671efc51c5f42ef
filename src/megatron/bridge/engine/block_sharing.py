"""Output files whose unchanged ranges share blocks with the files that they come from.

A file is laid out without regard to how it is written. Here it is divided into ranges that can be
shared, which begin and end with a block, and pieces of all else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from megatron.bridge.engine.pieces import (
    FileCopy,
    FillTensor,
    OutputFile,
    Part,
    Piece,
    pieces_of,
)
from megatron.bridge.engine.shared_blocks import BLOCK_BYTES, CannotShare, share_range
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.regular_file import open_regular
from megatron.bridge.tensors.arrays import array_over
from megatron.bridge.tensors.boxes import Box, box_shape

_LEAST_SHARED = 4 * BLOCK_BYTES
"""Bytes below which one more entry in the lists of blocks costs more than a copy."""


@dataclass(frozen=True, slots=True)
class TensorBytes(FileCopy):
    """A Part that is a range of another file: data of tensors that do not change."""

    @property
    def tensor_bytes(self) -> int:
        return self.nbytes


@dataclass(frozen=True, slots=True)
class TensorRange(TensorBytes):
    """Such a Part that is a box of a tensor. Where it is not shared, it is filled like others.

    Attributes:
        name: of the tensor.
        box: of the tensor.
        dtype: of the tensor.
        transposed: whether the data are in the order of the box with its last two axes swapped.
    """

    name: str
    box: Box
    dtype: str
    transposed: bool = False

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        shape = box_shape(self.box)
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        array = array_over(out, shape, self.dtype)
        fill(self.name, self.box, array.swapaxes(-1, -2) if self.transposed else array)


@dataclass(frozen=True, slots=True)
class SharedRange:
    """A range of an output file that is a range of another file, both in whole blocks.

    Attributes:
        file: name of the output file.
        offset: where it begins in that.
        copy: the same bytes as a Part: which range of which other file.
    """

    file: str
    offset: int
    copy: FileCopy

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.copy.nbytes

    @property
    def tensor_bytes(self) -> int:
        """How many bytes of it are tensor data."""
        return self.copy.tensor_bytes

    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        """It as pieces that are copied."""
        for begin in range(0, self.nbytes, piece_bytes):
            part = _part_of(self.copy, begin, min(begin + piece_bytes, self.nbytes))
            yield Piece(self.file, self.offset + begin, part.nbytes, (part,))


type Segment = Piece | SharedRange


def divided(
    file: OutputFile, piece_bytes: int, shares: Callable[[Path], bool]
) -> Iterator[Segment]:
    """A file as pieces and ranges to be shared, in order; they tile it.

    Args:
        file: laid out.
        piece_bytes: of a piece; a longer part is a piece of its own.
        shares: whether blocks can be shared with a file.
    """
    begin = position = 0
    rest: list[Part] = []
    for parts in _neighbours(file.parts):
        copy = _joined(parts)
        first, last = (0, 0) if copy is None else _whole_blocks(copy, position)
        if copy is None or last - first < _LEAST_SHARED or not shares(copy.path):
            rest += parts
            position += sum(part.nbytes for part in parts)
            continue
        before, inner, behind = _cut(copy, first, last)
        yield from _pieces(file.name, begin, [*rest, *before], piece_bytes)
        yield SharedRange(file.name, position + first, inner)
        begin, rest = position + last, behind
        position += copy.nbytes
    yield from _pieces(file.name, begin, rest, piece_bytes)


def share(folder: Path, file: OutputFile, ranges: Sequence[SharedRange]) -> list[SharedRange]:
    """Make an output file of its full length, and share ranges of it.

    Args:
        folder: the file lies in it, by its name; folders on the way are made.
        file: the file that the ranges are of.
        ranges: of this file.

    Returns:
        Those that the file system did not share.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    path = folder / file.name
    failed = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(target, file.nbytes)
            for source_path, of_source in groupby(ranges, key=lambda one: one.copy.path):
                with open_regular(source_path) as source:
                    for one in of_source:
                        begin = one.copy.offset
                        try:
                            share_range(source.fileno(), begin, one.nbytes, target, one.offset)
                        except CannotShare:
                            failed.append(one)
        finally:
            os.close(target)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: its blocks cannot be shared: {error.strerror}"
        ) from error
    return failed


def _neighbours(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts one by one, but those together that follow each other in another file, too."""
    group: list[Part] = []
    for part in parts:
        if group and not _follows(part, group[-1]):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _follows(part: Part, before: Part) -> bool:
    return (
        isinstance(part, FileCopy)
        and isinstance(before, FileCopy)
        and isinstance(part, TensorBytes) == isinstance(before, TensorBytes)
        and part.path == before.path
        and part.offset == before.offset + before.nbytes
    )


def _joined(neighbours: Sequence[Part]) -> FileCopy | None:
    """Neighbours as one range of the other file; None for a part that is none."""
    first = neighbours[0]
    if not isinstance(first, FileCopy):
        return None
    kind = TensorBytes if isinstance(first, TensorBytes) else FileCopy
    return kind(first.path, first.offset, sum(part.nbytes for part in neighbours))


def _whole_blocks(part: FileCopy, position: int) -> tuple[int, int]:
    """From which byte of a part to which both files have whole blocks; 0, 0 if they never do."""
    if (position - part.offset) % BLOCK_BYTES:
        return 0, 0
    return -position % BLOCK_BYTES, part.nbytes - (position + part.nbytes) % BLOCK_BYTES


def _cut(copy: FileCopy, first: int, last: int) -> tuple[list[Part], FileCopy, list[Part]]:
    """What of a range lies before its byte `first`, from there to `last`, and behind that."""
    before: list[Part] = [_part_of(copy, 0, first)] if first else []
    behind: list[Part] = [_part_of(copy, last, copy.nbytes)] if last < copy.nbytes else []
    return before, _part_of(copy, first, last), behind


def _part_of(copy: FileCopy, first: int, last: int) -> FileCopy:
    return type(copy)(copy.path, copy.offset + first, last - first)


def _pieces(file_name: str, begin: int, parts: Sequence[Part], piece_bytes: int) -> Iterator[Piece]:
    nbytes = sum(part.nbytes for part in parts)
    if nbytes > piece_bytes:
        for piece in pieces_of(OutputFile(file_name, tuple(parts)), piece_bytes):
            yield replace(piece, offset=begin + piece.offset)
    elif parts:
        yield Piece(file_name, begin, nbytes, tuple(parts))
