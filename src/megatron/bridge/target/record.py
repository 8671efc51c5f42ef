"""The record of a target: the job that makes it, and a line for each file that is finished.

    {"complete":false,"job":{...}}
    {"name":"iter_0000000/__0_0.distcp","nbytes":31,"pieces":[[16,907060870],[15,1442]]}

`pieces` are the lengths and CRC-32 of consecutive ranges of the file. A range whose blocks are
those of a file that was converted has none, for nobody has read it; [length, offset, file] says
which range of which file of the source it is. A line is written when its file is on the disk, so it
can be believed after whatever ended the run. The record of a target that is complete names all
files in order, and is its manifest: it does not depend on how many processes or runs made the
target. It is a hidden file, so it does not count as a side file of a model.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.strict_json import check_marks, parse_object
from megatron.bridge.target.folder_sync import sync
from megatron.bridge.target.job import Job
from megatron.bridge.target.json_fields import MAX_INTEGER, fields, is_file_name

MANIFEST_FILE = ".megatron-bridge.jsonl"
"""In an unfinished target, the record and the lock of the run, or of its first process."""

_PREFIX = ".megatron-bridge"
"""What all records begin with, and no file of a target does."""

MAX_RECORD_BYTES = 256 << 20
"""Ten times what 100 TB of pieces need."""

_MAX_MARKS = 16_000_000
"""Marks in the JSON, 3 or 4 a piece. Pieces are of 8 MiB, or of 64 KiB in a very small memory."""

_MAX_CRC = (1 << 32) - 1


class CheckedRange(NamedTuple):
    """A range of a file, by its checksum."""

    nbytes: int
    crc: int


class UnreadRange(NamedTuple):
    """A range of a file whose blocks are those of a file of the source.

    Attributes:
        offset: where it begins in that file.
        file: of the source, relative to its folder.
    """

    nbytes: int
    offset: int
    file: str


type RecordedRange = CheckedRange | UnreadRange


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One finished file.

    Attributes:
        name: relative to the target, with "/" between folders.
        pieces: the ranges that it consists of, in order.
    """

    name: str
    pieces: tuple[RecordedRange, ...]

    @property
    def nbytes(self) -> int:
        """The length of the file."""
        return sum(piece[0] for piece in self.pieces)

    @property
    def unread_bytes(self) -> int:
        """How many of its bytes have no checksum."""
        return sum(piece.nbytes for piece in self.pieces if isinstance(piece, UnreadRange))

    def to_line(self) -> bytes:
        """A line of the record."""
        return _line({"name": self.name, "nbytes": self.nbytes, "pieces": self.pieces})

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """What `to_line` gave. Raises ValueError for anything else."""
        kinds = {"name": str, "nbytes": int, "pieces": list}
        name, nbytes, pieces = fields(parse_object(_whole(line)), kinds)
        if not is_output_name(name):
            raise ValueError(f"{name[:200]!r} is not the name of a file inside the folder")
        record = cls(name, tuple(map(_recorded, pieces)))
        if record.nbytes != nbytes:
            raise ValueError(f"{name}: pieces of {record.nbytes} bytes, the file has {nbytes}")
        return record


@dataclass(frozen=True)
class Record:
    """The job that makes a target, and the files of it that are finished."""

    job: Job
    files: tuple[FileRecord, ...]
    complete: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def to_bytes(self) -> bytes:
        """The lines of the record."""
        head = _line({"job": self.job.to_json(), "complete": self.complete})
        return head + b"".join(file.to_line() for file in self.files)

    @classmethod
    def from_bytes(cls, text: bytes) -> Self:
        """What `to_bytes` gave, or of an unfinished target the lines before the first damaged one.

        Raises:
            ValueError: the first line is damaged, or any line of a complete target.
        """
        check_marks(text, _MAX_MARKS)
        lines = io.BytesIO(text)
        head = parse_object(_whole(lines.readline()))
        job, complete = fields(head, {"job": dict, "complete": bool})
        files = []
        for line in lines:
            try:
                files.append(FileRecord.from_line(line))
            except ValueError:
                if complete:
                    raise
                break
        names = [file.name for file in files]
        if complete and names != sorted(set(names)):
            raise ValueError("files should be in order and each of them there once")
        return cls(Job.from_json(job), tuple(files), complete)


def read_manifest(folder: Path) -> Record | None:
    """The record of a complete target; None if the folder has none.

    Raises:
        CheckpointError: the file cannot be read or is not a manifest.
    """
    path = folder / MANIFEST_FILE
    try:
        record = Record.from_bytes(_read(path))
        if not record.complete:
            raise ValueError("the target is not complete")
        return record
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a manifest: {error}; remove it if the files are known to be good"
        ) from error


def read_records(partial: Path) -> list[Record]:
    """The records of an unfinished target, of all processes; those without a first line are none.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = []
    for path in sorted(partial.glob(f"{_PREFIX}*.jsonl")):
        try:
            found.append(Record.from_bytes(_read(path)))
        except ValueError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return found


def record_path(partial: Path, rank: int) -> Path:
    """Where a process keeps its record."""
    return partial / (f"{_PREFIX}-{rank:05d}.jsonl" if rank else MANIFEST_FILE)


def remove_other_records(partial: Path) -> None:
    """Leave the record of the first process alone."""
    for path in partial.glob(f"{_PREFIX}*"):
        if path.name != MANIFEST_FILE:
            path.unlink()


def is_output_name(name: str) -> bool:
    """Whether a name may be that of a file in a target: inside the folder, and not of a record."""
    return is_file_name(name) and not name.startswith(_PREFIX)


class RecordWriter:
    """Adds lines to a record that is there. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, file: FileRecord) -> None:
        """Say that a file is on the disk. Raises OSError, after which nothing can be added."""
        line = file.to_line()
        with self._lock:
            if self._descriptor < 0:
                raise OSError(errno.EBADF, "the record is closed", str(self._path))
            try:
                written = os.write(self._descriptor, line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            if written != len(line):  # a further line would be glued to the torn one
                self._close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Nothing is added after this."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_new_record(path: Path, job: Job, files: Iterable[FileRecord], *, complete: bool) -> Path:
    """Write a record durably beside `path`, to which it is to be renamed.

    Returns:
        Where it lies.
    """
    files = sorted(files, key=lambda file: file.name)
    new = path.with_suffix(".new")
    new.write_bytes(Record(job, tuple(files), complete).to_bytes())
    sync(new)
    return new


def _read(path: Path) -> bytes:
    status = path.stat()  # before opening: a pipe would wait for a writer
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_RECORD_BYTES:
        raise ValueError(f"{status.st_size} bytes, the limit is {MAX_RECORD_BYTES}")
    return path.read_bytes()


def _whole(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        raise ValueError("the last line is torn")
    return line


def _recorded(value: Any) -> RecordedRange:
    if type(value) is list and value and type(value[0]) is int and 0 < value[0] <= MAX_INTEGER:
        match value[1:]:
            case [int(crc)] if type(crc) is int and 0 <= crc <= _MAX_CRC:
                return CheckedRange(value[0], crc)
            case [int(offset), str(file)] if (
                type(offset) is int and 0 <= offset <= MAX_INTEGER and is_file_name(file)
            ):
                return UnreadRange(value[0], offset, file)
    raise ValueError("expected pieces [bytes, CRC-32] or [bytes, offset, file]")


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
