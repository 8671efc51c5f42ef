"""The journals of an unfinished target: which pieces are on the disk, and their checksums.

A journal belongs to one process. Its first line tells the job and the boot of the machine, each
further line a piece that was written:

    {"job": {...}, "boot": "60edd430-..."}
    {"file": "iter_0000000/__0_0.distcp", "offset": 0, "nbytes": 16777216, "crc32": 907060870}

A line is written with one call after its piece was, so nothing that a killed process recorded is
lost: the kernel keeps its writes. A power cut loses writes of either kind, in any order; then the
boot is another one, and a piece is believed only when it was read back.
"""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.target.folder_sync import sync
from megatron.bridge.target.job import Job
from megatron.bridge.target.json_fields import fields
from megatron.bridge.target.manifest import (
    JOURNAL_FOLDER,
    MAX_MANIFEST_BYTES,
    PieceKey,
    is_output_name,
)

SUFFIX = ".jsonl"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_CRC = (1 << 32) - 1


class Ranged(Protocol):
    """A range of an output file, such as a Piece."""

    @property
    def file(self) -> str:
        """Name relative to the output folder."""

    @property
    def offset(self) -> int:
        """Its first byte."""

    @property
    def nbytes(self) -> int:
        """Its length."""


def boot_id() -> str | None:
    """Another string after every start of the machine; None where the system has none."""
    try:
        return _BOOT_ID.read_text().strip() or None
    except OSError:
        return None


class Journal:
    """The journal that this process writes. Safe to use from several threads."""

    def __init__(self, path: Path, job: Job) -> None:
        """Begin a journal; raises FileExistsError rather than to go on with an old one."""
        self.path = path
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._write(_header(job))

    def record(self, piece: Ranged, crc32: int) -> None:
        """Say that a piece is written; a piece of no bytes is nothing to say. Raises OSError."""
        if piece.nbytes:
            self._write(_line(PieceKey(piece.file, piece.offset, piece.nbytes), crc32))

    def close(self) -> None:
        """Nothing is recorded after this."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._descriptor < 0:
                raise OSError(errno.EBADF, "the journal is closed", str(self.path))
            try:
                complete = os.write(self._descriptor, line) == len(line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not complete:  # a further line would be glued to the torn one
                os.close(self._descriptor)
                self._descriptor = -1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def write_journal(path: Path, job: Job, pieces: Mapping[PieceKey, int]) -> None:
    """Write a journal of what is known already, durably: it is there as a whole or not at all."""
    new = path.with_suffix(".new")
    new.write_bytes(_header(job) + b"".join(_line(key, crc) for key, crc in pieces.items()))
    sync(new)
    new.replace(path)
    sync(path.parent)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a journal says. boot: of the machine when its pieces were written."""

    job: Job
    boot: str | None
    pieces: Mapping[PieceKey, int]

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a journal up to the first line that is damaged or torn; None if that is the first.

        Raises CheckpointError if the file cannot be read.
        """
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise CheckpointError(f"{path}: longer than {MAX_MANIFEST_BYTES} bytes")
            text = io.BytesIO(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            first = _whole(text.readline())
            job, boot = fields(parse_object(first), {"job": dict, "boot": (str, type(None))})
            known = cls(Job.from_json(job), boot, pieces := {})
        except ValueError:
            return None
        for line in text:
            try:
                key, crc = _parse(_whole(line))
            except ValueError:
                break
            pieces[key] = crc
        return known


def read_journals(folder: Path) -> list[Recorded]:
    """All journals of an unfinished target that have a first line. Raises CheckpointError."""
    paths = sorted((folder / JOURNAL_FOLDER).glob(f"*{SUFFIX}"))
    return [journal for path in paths if (journal := Recorded.read(path)) is not None]


def _header(job: Job) -> bytes:
    return _dumps({"job": job.to_json(), "boot": boot_id()})


def _line(key: PieceKey, crc32: int) -> bytes:
    return _dumps({**key._asdict(), "crc32": crc32})


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _whole(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        raise ValueError("the line is torn")
    return line


def _parse(line: bytes) -> tuple[PieceKey, int]:
    kinds = {"file": str, "offset": int, "nbytes": int, "crc32": int}
    file, offset, nbytes, crc32 = fields(parse_object(line), kinds)
    if not is_output_name(file) or not nbytes or crc32 > _MAX_CRC:
        raise ValueError("not a piece")
    return PieceKey(file, offset, nbytes), crc32
