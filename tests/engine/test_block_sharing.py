"""Files that share blocks: the same bytes as copies, on file systems that share and on others."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.bridge.engine import shared_blocks
from megatron.bridge.engine.block_sharing import SharedRange, TensorBytes, divided, share
from megatron.bridge.engine.pieces import FileCopy, Literal, OutputFile, Part, Piece
from megatron.bridge.engine.shared_blocks import (
    BLOCK_BYTES,
    CannotShare,
    share_range,
    why_not_shared,
)
from megatron.bridge.errors import CheckpointError
from shared_block_systems import SYSTEMS, mounted, used_bytes
from written_pieces import content_of

PIECE = 10 * BLOCK_BYTES
SOURCE_BYTES = (1 << 20) + 777


@pytest.fixture(scope="module", params=SYSTEMS)
def sharing(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a file system that shares blocks."""
    with mounted(request.param) as folder:
        yield folder


def source_file(folder: Path) -> Path:
    path = folder / "source"
    path.write_bytes(random.Random(5).randbytes(SOURCE_BYTES))
    return path


def file_of_ranges(source: Path, chance: random.Random) -> OutputFile:
    """Known bytes and ranges of a file in turn: aligned or not, some following each other."""
    parts: list[Part] = []
    position = 0
    for number in range(40):
        offset = chance.randrange(SOURCE_BYTES // 2)
        nbytes = chance.choice([1, 5000, 70_000, 200_001])
        gap = (offset - position) % BLOCK_BYTES if number % 3 else chance.randrange(9000)
        kind = chance.choice([TensorBytes, FileCopy])
        parts += [Literal(chance.randbytes(gap)), kind(source, offset, nbytes)]
        if number % 4 == 0:
            parts.append(kind(source, offset + nbytes, 3 * BLOCK_BYTES))
        position = sum(part.nbytes for part in parts)
    return OutputFile("folder/file", tuple(parts))


def write(folder: Path, piece: Piece) -> None:
    with (folder / piece.file).open("r+b") as file:
        file.seek(piece.offset)
        file.write(content_of(piece.parts))


def made(folder: Path, file: OutputFile) -> tuple[bytes, int]:
    """What the file holds when its ranges are shared and the rest is written; bytes shared."""
    segments = list(divided(file, PIECE, lambda _: True))
    ranges = [one for one in segments if isinstance(one, SharedRange)]
    failed = share(folder, file, ranges)
    for piece in (one for one in segments if isinstance(one, Piece)):
        write(folder, piece)
    for one in failed:
        for piece in one.pieces(PIECE):
            write(folder, piece)
    shared = sum(one.nbytes for one in ranges) - sum(one.nbytes for one in failed)
    return (folder / file.name).read_bytes(), shared


# --- dividing: no file system is asked ---


@pytest.mark.parametrize("seed", range(5))
def test_segments_tile_the_file_in_order(tmp_path: Path, seed: int) -> None:
    source = source_file(tmp_path)
    file = file_of_ranges(source, random.Random(seed))
    position, whole, tensor_bytes = 0, b"", 0
    ranges = 0
    for segment in divided(file, PIECE, lambda _: True):
        assert (segment.file, segment.offset) == (file.name, position)
        position += segment.nbytes
        tensor_bytes += segment.tensor_bytes
        if isinstance(segment, SharedRange):
            ranges += 1
            for number in (segment.offset, segment.nbytes, segment.copy.offset):
                assert number % BLOCK_BYTES == 0
            copied = list(segment.pieces(PIECE))
            assert all(piece.nbytes <= PIECE for piece in copied)
            assert [piece.offset for piece in copied] == [
                segment.offset + at for at in range(0, segment.nbytes, PIECE)
            ]
            whole += b"".join(content_of(piece.parts) for piece in copied)
        else:
            assert segment.nbytes <= max(PIECE, *(part.nbytes for part in segment.parts))
            whole += content_of(segment.parts)
    assert ranges > 5
    assert whole == content_of(file.parts)
    assert tensor_bytes == sum(part.tensor_bytes for part in file.parts)


def test_what_is_shared_is_as_long_as_it_can_be(tmp_path: Path) -> None:
    """Neighbours are one range, and only less than a block at either end is copied."""
    source = source_file(tmp_path)
    begin, nbytes = BLOCK_BYTES + 100, 9 * BLOCK_BYTES
    parts = (Literal(b"x" * 100), TensorBytes(source, begin, nbytes),
             TensorBytes(source, begin + nbytes, nbytes + 7))  # fmt: skip
    segments = list(divided(OutputFile("file", parts), PIECE, lambda _: True))
    assert [type(one) for one in segments] == [Piece, SharedRange, Piece]
    assert [one.nbytes for one in segments] == [
        BLOCK_BYTES,
        17 * BLOCK_BYTES,
        107,
    ]
    assert segments[1].tensor_bytes == 17 * BLOCK_BYTES


def test_a_file_that_does_not_share_is_pieces(tmp_path: Path) -> None:
    source = source_file(tmp_path)
    file = OutputFile.copy_of("file", source, PIECE)
    segments = list(divided(file, PIECE, lambda path: path != source))
    assert [type(one) for one in segments] == [Piece] * len(file.parts)
    assert all(one.nbytes <= PIECE for one in segments)


# --- file systems that share ---


@pytest.mark.parametrize("seed", range(3))
def test_the_bytes_are_those_of_a_copy(sharing: Path, tmp_path: Path, seed: int) -> None:
    source = source_file(sharing)
    file = file_of_ranges(source, random.Random(seed))
    found, shared = made(sharing, file)
    assert found == content_of(file.parts)
    assert shared > file.nbytes / 3
    copied, nothing = made(tmp_path, file)
    assert (copied, nothing) == (found, 0)


def test_it_takes_no_room(sharing: Path) -> None:
    assert why_not_shared(source_file(sharing), sharing) is None
    source = source_file(sharing)
    before = used_bytes(sharing)
    file = OutputFile.copy_of("whole", source, PIECE)
    found, shared = made(sharing, file)
    assert zlib.crc32(found) == zlib.crc32(source.read_bytes())
    assert shared == SOURCE_BYTES // BLOCK_BYTES * BLOCK_BYTES
    # btrfs keeps its lists of blocks in nodes of 16 KiB.
    assert used_bytes(sharing) - before < SOURCE_BYTES / 4


def test_a_change_of_one_file_does_not_show_in_the_other(sharing: Path) -> None:
    source = source_file(sharing)
    before = source.read_bytes()
    file = OutputFile.copy_of("changed", source, PIECE)
    made(sharing, file)
    with (sharing / "changed").open("r+b") as opened:
        opened.seek(5 * BLOCK_BYTES + 3)
        opened.write(b"other")
    assert source.read_bytes() == before
    with source.open("r+b") as opened:
        opened.seek(9 * BLOCK_BYTES)
        opened.write(b"another")
    assert (
        (sharing / "changed")
        .read_bytes()[9 * BLOCK_BYTES :]
        .startswith(before[9 * BLOCK_BYTES :][:7])
    )


def test_ranges_beside_blocks_are_copied(sharing: Path) -> None:
    source = source_file(sharing)
    with source.open("rb") as given, (sharing / "target").open("w+b") as target:
        with pytest.raises(CannotShare):
            share_range(given.fileno(), 100, BLOCK_BYTES, target.fileno(), 0)
        with pytest.raises(CannotShare):  # behind the end of the source
            share_range(given.fileno(), 4 << 20, BLOCK_BYTES, target.fileno(), 0)


def test_another_file_system_is_copied_to(sharing: Path, tmp_path: Path) -> None:
    source = source_file(sharing)
    assert why_not_shared(source, tmp_path) is not None
    found, shared = made(tmp_path, OutputFile.copy_of("file", source, PIECE))
    assert (found, shared) == (source.read_bytes(), 0)


# --- file systems that do not ---


def test_what_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every error says that blocks cannot be shared: some are of a disk that is full."""
    source = source_file(tmp_path)
    file = OutputFile.copy_of("file", source, PIECE)
    ranges = [one for one in divided(file, PIECE, lambda _: True) if isinstance(one, SharedRange)]

    def ioctl(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    for code in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM):
        assert share(tmp_path, file, ranges) == ranges
        assert why_not_shared(source, tmp_path) == os.strerror(code)
    for code in (errno.ENOSPC, errno.EIO):
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            share(tmp_path, file, ranges)
        with pytest.raises(OSError, match=os.strerror(code)):
            why_not_shared(source, tmp_path)


def test_other_systems_have_no_such_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_file(tmp_path)
    monkeypatch.setattr(shared_blocks.sys, "platform", "darwin")
    assert why_not_shared(source, tmp_path) == "darwin has no call for it"


def test_a_source_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    one = SharedRange("file", 0, FileCopy(missing, 0, BLOCK_BYTES))
    with pytest.raises(CheckpointError, match="missing"):
        share(tmp_path, OutputFile("file", (one.copy,)), [one])
    os.mkfifo(missing)
    with pytest.raises(CheckpointError, match="not a regular file"):
        share(tmp_path, OutputFile("file", (one.copy,)), [one])


def test_a_file_shorter_than_a_block_is_not_tried(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x")
    assert why_not_shared(short, tmp_path) == "it is shorter than a block"
