"""What a source looked like when a conversion began: enough to notice that it changed since.

Cheap: sizes, times and the heads of files, no tensor data. For hundreds of files it takes well
under a second.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from megatron.bridge.errors import CheckpointError, SourceChanged
from megatron.bridge.formats.config_record import CONFIG_RECORD
from megatron.bridge.formats.iterations import METADATA_FILE, Iteration, iteration_folder
from megatron.bridge.formats.torch_dist.index_format import TORCH_DIST_SUFFIX
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE, is_safetensors
from megatron.bridge.target.json_fields import fields, is_file_name

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

MAX_HEAD_BYTES = 128 << 20
"""So much of a file that is no weights is hashed."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file; a symlink is followed.

    Attributes:
        name: relative to the source's folder.
        mtime_ns: time of the last modification, in nanoseconds since 1970.
        head: SHA-256 of the header of a safetensors file, or of the first MAX_HEAD_BYTES of any
            other; None for a .distcp file, whose parts are described by `.metadata`.
    """

    name: str
    nbytes: int
    mtime_ns: int
    head: str | None

    @classmethod
    def of(cls, folder: Path, name: str) -> Self:
        """Look at a file. Raises OSError."""
        path = folder / name
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            head = _head(file, path.name)
        return cls(name, status.st_size, max(0, status.st_mtime_ns), head)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """What `asdict` gives, as JSON has it. Raises ValueError for anything else."""
        name, nbytes, mtime_ns, head = fields(
            value, {"name": str, "nbytes": int, "mtime_ns": int, "head": (str, type(None))}
        )
        if not is_file_name(name):
            raise ValueError(f"{name[:200]!r} is not a valid name of a file inside the folder")
        return cls(name, nbytes, mtime_ns, head)

    def change_since(self, old: SourceFile) -> str | None:
        """What is different, in a few words; None if nothing is."""
        if self.nbytes != old.nbytes:
            return f"size {old.nbytes} -> {self.nbytes}"
        if self.head != old.head:
            return "another header" if is_safetensors(self.name) else "other contents"
        return None if self.mtime_ns == old.mtime_ns else "modified"


def _head(file: BinaryIO, name: str) -> str | None:
    if name.endswith(TORCH_DIST_SUFFIX):
        return None
    if is_safetensors(name):
        prefix = file.read(LENGTH_BYTES)
        length = min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES)
        return hashlib.sha256(prefix + file.read(length)).hexdigest()
    digest, left = hashlib.sha256(), MAX_HEAD_BYTES
    while left and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """The files that a conversion reads. Where they lie is no part of it: a folder may move."""

    files: tuple[SourceFile, ...]
    folder: Path | None = field(default=None, compare=False)

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> Self:
        """Look at the files of these names. Raises CheckpointError if one cannot be read."""
        try:
            return cls(tuple(SourceFile.of(folder, name) for name in sorted(set(names))), folder)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error

    @classmethod
    def from_json(cls, value: object) -> Self:
        """What `to_json` gave. Raises ValueError for anything else."""
        (files,) = fields(value, {"files": list})
        return cls(tuple(SourceFile.from_json(file) for file in files))

    def to_json(self) -> dict[str, object]:
        """The fingerprint as plain JSON values."""
        return {"files": [asdict(file) for file in self.files]}

    def changed_since(self, old: Fingerprint) -> list[str]:
        """Each file that is different from what it was, and how; empty if none is."""
        found = {file.name: file for file in self.files}
        known = {file.name: file for file in old.files}
        changes = [f"{name}: missing" for name in known if name not in found]
        changes += [f"{name}: new" for name in found if name not in known]
        for name in found.keys() & known.keys():
            if change := found[name].change_since(known[name]):
                changes.append(f"{name}: {change}")
        return sorted(changes)


def check_unchanged(fingerprint: Fingerprint, folder: Path | None = None) -> None:
    """Look again at all files, in `folder` or where they were. Raises SourceChanged."""
    folder = folder or fingerprint.folder
    if folder is None:
        return
    seen = []
    problems = []
    for file in fingerprint.files:
        try:
            seen.append(SourceFile.of(folder, file.name))
        except FileNotFoundError:
            continue  # reported as missing
        except OSError as error:
            problems.append(f"{file.name}: cannot be read: {error.strerror}")
            seen.append(file)
    problems = sorted(problems + Fingerprint(tuple(seen)).changed_since(fingerprint))
    if problems:
        raise SourceChanged.of_problems(
            f"{folder} changed while it was converted, so the result would be of neither state; "
            f"run it again when nothing writes there",
            problems,
        )


def hf_fingerprint(hf: PreTrainedVLM, *, side_files: bool) -> Fingerprint:
    """The fingerprint of a Hugging Face model: its config.json, its weights and their index.

    Args:
        hf: the model; there are no files of one that is only a config.
        side_files: whether the other files belong to it, too.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not hf.has_files:
        return Fingerprint(())
    folder, names = hf.folder, [CONFIG_FILE]
    if hf.has_weights:
        folder = hf.weights_folder
        names += [shard.file_name for shard in hf.tensors.shards]
        if hf.tensors.index_metadata is not None:
            names.append(INDEX_FILE)
    if side_files:
        names += [path.as_posix() for path in hf.side_files]
    return Fingerprint.of(folder, names)


def megatron_fingerprint(folder: Path, iteration: Iteration | None = None) -> Fingerprint:
    """The index, data and config record of an iteration. Raises what `iteration_folder` does."""
    found = iteration_folder(folder, iteration)
    names = [METADATA_FILE, *(path.name for path in found.glob(f"*{TORCH_DIST_SUFFIX}"))]
    if (found / CONFIG_RECORD).is_file():
        names.append(CONFIG_RECORD)
    return Fingerprint.of(found, names)
