"""Writing pieces to their places: past the page cache, through it, and both in one file."""

import errno
import fcntl
import mmap
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.bridge.engine import piece_writer
from megatron.bridge.engine.piece_writer import PieceBuffer, PieceWriter
from megatron.bridge.engine.pieces import Piece
from megatron.bridge.errors import CheckpointError
from open_files import few_open_files
from written_pieces import write_in_threads

PAGE = mmap.PAGESIZE
LONG = 40 * PAGE

type Pwrite = Callable[[int, memoryview, int], int]
_pwrite: Pwrite = os.pwrite


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def has_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True


def refused_when_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def open_file(path: Path, flags: int, *arguments: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *arguments)

    monkeypatch.setattr(os, "open", open_file)


def refused_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return _pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def less_than_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct write that ends inside of a page; the disk may refuse to go on from there."""

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written = PAGE + 512 if is_direct(descriptor) else min(len(data), 1000)
        return _pwrite(descriptor, data[:written], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_writer, "_DIRECT", None)


def supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file system has it."""


def pieces_of_a_file(chance: random.Random) -> Iterator[Piece]:
    offset = 0
    for _ in range(60):
        nbytes = chance.choice([0, 1, PAGE - 1, PAGE, PAGE + 1, LONG, LONG + 1, 3 * LONG - 5])
        yield Piece("folder/file", offset, nbytes, ())
        offset += nbytes


@pytest.mark.parametrize(
    "direct_writes",
    [supported, unknown, refused_when_opened, refused_when_written, less_than_a_page],
)
def test_every_byte_lands_in_its_place(
    direct_writes: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By three threads, in any order."""
    direct_writes(monkeypatch)
    chance = random.Random(7)
    pieces = list(pieces_of_a_file(chance))
    content = chance.randbytes(pieces[-1].offset + pieces[-1].nbytes)
    chance.shuffle(pieces)

    write_in_threads(tmp_path, ("folder/file",), content, pieces, LONG)
    assert (tmp_path / "folder" / "file").read_bytes() == content


def test_whole_pages_of_long_pieces_go_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_direct_writes(tmp_path):
        pytest.skip("the file system has no direct writes")
    written: list[tuple[bool, int, int]] = []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((is_direct(descriptor), offset, offset + len(data)))
        return _pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    buffer = PieceBuffer(LONG)
    places = [(LONG + 10, LONG), (10, LONG), (2 * LONG + 10, 3 * PAGE)]
    pieces = [Piece("file", offset, nbytes, ()) for offset, nbytes in places]
    with PieceWriter(tmp_path, {"file": 3 * LONG}, pieces) as writer:
        for piece in pieces:
            writer.write(piece, buffer.room_for(piece))
    # Ends that share a page are written together, and behind everything that goes past the cache.
    assert written == [
        (True, LONG + PAGE, 2 * LONG),
        (True, PAGE, LONG),
        (False, 2 * LONG + 10, 2 * LONG + 3 * PAGE + 10),
        (False, 10, PAGE),
        (False, LONG, LONG + PAGE),
        (False, 2 * LONG, 2 * LONG + 10),
    ]


def test_a_buffer_grows_and_is_reused() -> None:
    buffer = PieceBuffer(LONG)
    first = buffer.room_for(Piece("f", 5 * PAGE + 11, LONG, ()))
    first[:2] = b"ab"
    again = buffer.room_for(Piece("f", 11, 2, ()))
    assert bytes(again) == b"ab"
    assert len(buffer.room_for(Piece("f", 0, 4 * LONG, ()))) == 4 * LONG


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails(
    code: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a direct write, no other way is tried."""
    if direct and not has_direct_writes(tmp_path):
        pytest.skip("the file system has no direct writes")

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor) == direct:
            raise OSError(code, os.strerror(code))
        return _pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    piece = Piece("file", 1, LONG, ())
    with (
        PieceWriter(tmp_path, {"file": LONG + 1}, [piece]) as writer,
        pytest.raises(CheckpointError, match=rf"file: cannot be written: {os.strerror(code)}"),
    ):
        writer.write(piece, PieceBuffer(LONG).room_for(piece))


@pytest.mark.parametrize("direct", [False, True])
def test_a_disk_that_takes_nothing_and_says_nothing(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if direct and not has_direct_writes(tmp_path):
        pytest.skip("the file system has no direct writes")

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        return 0 if is_direct(descriptor) == direct else _pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    piece = Piece("file", 1, LONG, ())
    with (
        PieceWriter(tmp_path, {"file": LONG + 1}, [piece]) as writer,
        pytest.raises(CheckpointError, match="file: cannot be written: nothing is written"),
    ):
        writer.write(piece, PieceBuffer(LONG).room_for(piece))


@pytest.mark.parametrize("function", ["fsync", "close"])
def test_what_the_disk_says_in_the_end_is_not_lost(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems only then tell that a write failed. What else went wrong is not hidden."""
    pieces = [Piece("file", 0, 10, ()), Piece("file", 10, 10, ()), Piece("other", 0, 9, ())]
    buffer = PieceBuffer(LONG)

    def fail(descriptor: int) -> None:
        real(descriptor)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def write_all() -> None:
        with PieceWriter(tmp_path, {"file": 20, "other": 9}, pieces) as writer:
            for piece in pieces[:2]:
                writer.write(piece, buffer.room_for(piece))

    def write_less() -> None:
        with PieceWriter(tmp_path, {"file": 20, "other": 9}, pieces) as writer:
            for piece in pieces[::2]:
                writer.write(piece, buffer.room_for(piece))
            raise ValueError("something else")

    real = getattr(os, function)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match="file: cannot be written: Disk quota exceeded"):
        write_all()
    with pytest.raises(CheckpointError, match="other: cannot be written: Disk quota exceeded"):
        write_less()
    pieces[2] = pieces[0]
    with pytest.raises(ValueError, match="something else"):
        write_less()


def test_a_file_is_flushed_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order its pieces come; its checksums are in the order of the file."""
    flushed: list[str] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append(f"{path.name}: {path.read_bytes().decode()}")

    monkeypatch.setattr(os, "fsync", fsync)
    content = b"seven, eight and nine"
    cuts = [(7, 12), (0, 7), (12, 12), (12, 21)]
    pieces = [Piece("file", begin, end - begin, ()) for begin, end in cuts]
    buffer = PieceBuffer(LONG)
    with PieceWriter(tmp_path, {"file": len(content)}, pieces) as writer:
        for piece in pieces:
            data = buffer.room_for(piece)
            data[:] = content[piece.offset : piece.offset + piece.nbytes]
            assert flushed == []
            told = writer.write(piece, data)
            assert (told is None) == (piece is not pieces[-1])
    assert flushed == [f"file: {content.decode()}"]
    assert told == tuple(
        (len(part), zlib.crc32(part)) for part in (b"seven, ", b"eight", b" and nine")
    )


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    names = [f"file{number}" for number in range(90)]
    pieces = [Piece(name, at, 10, ()) for name in names for at in (0, 10)]
    buffer = PieceBuffer(10)
    with few_open_files(30), PieceWriter(tmp_path, dict.fromkeys(names, 20), pieces) as writer:
        for piece in pieces:
            writer.write(piece, buffer.room_for(piece))
    assert [(tmp_path / name).stat().st_size for name in names] == [20] * 90


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()
    piece = Piece("folder/file", 0, 1, ())
    with (
        PieceWriter(tmp_path, {"folder/file": 1}, [piece]) as writer,
        pytest.raises(CheckpointError, match="cannot be written"),
    ):
        writer.write(piece, PieceBuffer(1).room_for(piece))


def test_blocks_are_reserved_for_whole_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranges may be blocks of other files already; an earlier run's file may be longer."""
    reserved: list[int] = []
    monkeypatch.setattr(piece_writer, "reserve", lambda _, nbytes: reserved.append(nbytes))
    pieces = [Piece("whole", 0, LONG, ()), Piece("whole", LONG, 7, ()), Piece("part", LONG, 9, ())]
    (tmp_path / "whole").write_bytes(bytes(3 * LONG))
    (tmp_path / "part").write_bytes(b"x" * LONG)
    buffer = PieceBuffer(LONG)
    with PieceWriter(tmp_path, {"whole": LONG + 7, "part": LONG + 9}, pieces) as writer:
        for piece in pieces:
            writer.write(piece, buffer.room_for(piece))
    assert reserved == [LONG + 7]
    assert (tmp_path / "whole").stat().st_size == LONG + 7
    part = (tmp_path / "part").read_bytes()
    assert (part[:LONG], len(part)) == (b"x" * LONG, LONG + 9)
