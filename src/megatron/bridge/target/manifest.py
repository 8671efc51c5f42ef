"""The manifest of a complete target: how it was made, and the checksum of each of its pieces.

It is a hidden file, so it does not count as a side file of a model. It does not depend on how many
processes or runs made the target.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.target.job import Job
from megatron.bridge.target.json_fields import fields, is_file_name

MANIFEST_FILE = ".megatron-bridge.json"
JOURNAL_FOLDER = ".megatron-bridge"
"""In an unfinished target: what its manifest will be made of."""

MAX_MANIFEST_BYTES = 256 << 20
"""Ten times what 100 TB of pieces need."""

_MAX_MARKS = 16_000_000
"""Of its JSON: 4 a piece. Pieces are of 8 MiB, or of 64 KiB in a very small memory."""

_MAX_CRC = (1 << 32) - 1


class PieceKey(NamedTuple):
    """A contiguous range of a file: its name relative to the target, and bytes."""

    file: str
    offset: int
    nbytes: int


class PieceSum(NamedTuple):
    """A range of a file in bytes, and the CRC-32 of it."""

    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its size in bytes, and the pieces that tile it, in order."""

    name: str
    nbytes: int
    pieces: tuple[PieceSum, ...]


@dataclass(frozen=True)
class Manifest:
    """The job that made a target, and its files by name."""

    job: Job
    files: tuple[FileRecord, ...]

    @classmethod
    def of(cls, job: Job, sizes: Mapping[str, int], finished: Mapping[PieceKey, int]) -> Self:
        """Merge finished pieces (with their CRC-32). Raises CheckpointError if they do not tile."""
        by_file: dict[str, list[PieceSum]] = {name: [] for name in sizes}
        for (file, offset, nbytes), crc in finished.items():
            by_file[file].append(PieceSum(offset, nbytes, crc))
        files = tuple(
            FileRecord(name, nbytes, tuple(sorted(by_file[name])))
            for name, nbytes in sorted(sizes.items())
        )
        faults = [fault for file in files if (fault := _tiling_fault(file))]
        if faults:
            raise CheckpointError("the output is not complete: " + "; ".join(faults[:20]))
        return cls(job, files)

    def pieces(self) -> Iterator[tuple[PieceKey, int]]:
        """Every piece with its CRC-32, file by file."""
        for file in self.files:
            for offset, nbytes, crc in file.pieces:
                yield PieceKey(file.name, offset, nbytes), crc

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.files)

    def to_text(self) -> str:
        """JSON, one file a line; equal manifests give equal text."""
        files = ",\n".join(
            "  " + _dumps({"name": file.name, "nbytes": file.nbytes, "pieces": file.pieces})
            for file in self.files
        )
        return f'{{\n "job": {_dumps(self.job.to_json())},\n "files": [\n{files}\n ]\n}}\n'

    @classmethod
    def from_text(cls, text: bytes) -> Self:
        """What `to_text` gave. Raises ValueError for anything else."""
        job, files = fields(parse_object(text, _MAX_MARKS), {"job": dict, "files": list})
        records = tuple(_file_record(file) for file in files)
        names = [record.name for record in records]
        if names != sorted(set(names)):
            raise ValueError("files should be in order and each of them there once")
        return cls(Job.from_json(job), records)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None if it has none.

    Nothing in it is believed before it is checked. Raises CheckpointError if it is no manifest.
    """
    path = folder / MANIFEST_FILE
    try:
        status = path.stat()  # before opening: a pipe would wait for a writer
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{status.st_size} bytes, the limit is {MAX_MANIFEST_BYTES}")
        return Manifest.from_text(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a manifest: {error}; remove it if the files are known to be good"
        ) from error


def _file_record(value: object) -> FileRecord:
    name, nbytes, pieces = fields(value, {"name": str, "nbytes": int, "pieces": list})
    if not is_output_name(name):
        raise ValueError(f"{name[:200]!r} is no file name inside the folder")
    if not all(map(_is_piece, pieces)):
        raise ValueError(f"{name}: expected pieces [offset, bytes, CRC-32]")
    record = FileRecord(name, nbytes, tuple(PieceSum(*piece) for piece in pieces))
    if fault := _tiling_fault(record):
        raise ValueError(fault)
    return record


def is_output_name(name: str) -> bool:
    """Whether a name may be that of a file in a target: inside the folder, and none of ours."""
    return is_file_name(name) and name.split("/")[0] not in (JOURNAL_FOLDER, MANIFEST_FILE)


def _is_piece(value: Any) -> bool:
    if type(value) is not list or len(value) != 3 or any(type(n) is not int for n in value):
        return False
    offset, nbytes, crc = value
    return offset >= 0 and nbytes > 0 and 0 <= crc <= _MAX_CRC


def _tiling_fault(file: FileRecord) -> str | None:
    position = 0
    for piece in file.pieces:
        if piece.offset != position:
            fault = "missing" if piece.offset > position else "twice there"
            return f"{file.name}: bytes from {min(position, piece.offset)} on are {fault}"
        position += piece.nbytes
    if position != file.nbytes:
        return f"{file.name}: pieces of {position} bytes, the file has {file.nbytes}"
    return None


def _dumps(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
