"""Which files of a model folder are its weights: those that transformers reads.

`model.safetensors` where it is there, otherwise the files that the weight index names, otherwise
the only safetensors file. Any other safetensors file lies beside the model.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.other_formats import other_weights
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.safetensors_header import MAX_HEADER_BYTES
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.text.quoting import is_name, printable, quoted

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SUFFIX = ".safetensors"

_MAX_FILE_NAME = 255
_MAX_PATH = 1000


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        names: sorted, relative to the folder with "/" between folders.
        index: what the weight index maps the names of tensors to; None without one.
        metadata: the `metadata` object of the index, empty where it has none.
    """

    names: list[str]
    index: dict[str, str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> WeightFiles:
        """Those of a folder. Raises CheckpointError where there are none, or no one can tell."""
        index_path = folder / INDEX_FILE
        has_single = (folder / SINGLE_FILE).is_file()
        if not os.path.lexists(index_path):
            return cls([SINGLE_FILE] if has_single else [_only_file(folder)])
        if not has_single:
            return _read_index(index_path)
        # The single file counts, and an index only if it is one of that file alone.
        with suppress(CheckpointError):
            if (indexed := _read_index(index_path)).names == [SINGLE_FILE]:
                return indexed
        return cls([SINGLE_FILE])


def is_safetensors(file_name: str) -> bool:
    """Whether a name is that of a safetensors file; some savers put a number behind the suffix."""
    return SUFFIX in file_name and not file_name.endswith(".json")


def has_weight_files(folder: Path) -> bool:
    """Whether there are safetensors files, or an index that names files which are there."""
    if any(folder.glob(f"*{SUFFIX}")):
        return True
    try:
        return any((folder / name).exists() for name in WeightFiles.of(folder).names)
    except CheckpointError:
        return False


def weight_file_names(folder: Path) -> frozenset[str]:
    """Paths of the weights' files and of their index; none where that cannot be told."""
    try:
        files = WeightFiles.of(folder)
    except CheckpointError:
        return frozenset()
    return frozenset(files.names) | ({INDEX_FILE} if files.index is not None else set())


def _only_file(folder: Path) -> str:
    names = (path.name for path in folder.glob(f"*{SUFFIX}"))
    found = sorted(name for name in names if not name.startswith("."))
    if not found:
        raise CheckpointError(
            other_weights(folder)
            or f"{folder}: no safetensors weights; expected {INDEX_FILE} or {SINGLE_FILE}"
        )
    if len(found) > 1:
        shown = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files ({printable(shown)}), and neither "
            f"{SINGLE_FILE} nor {INDEX_FILE}, so that nothing says which belong to the model; if "
            f"they are its shards, add the {INDEX_FILE} that was saved with them"
        )
    return found[0]


def _read_index(path: Path) -> WeightFiles:
    try:
        content = parse_object(read_regular(path, MAX_HEADER_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: the weight index cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the weight index cannot be read: {error}; download it again"
        ) from error
    weight_map = content.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file_name, str) for file_name in weight_map.values())
    ):
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to file names; download it again"
        )
    for name, file_name in weight_map.items():
        if not is_name(name):
            raise CheckpointError(
                f"{path}: {quoted(name)} cannot be the name of a tensor: too long, or not printable"
            )
        if not _is_inside(file_name):
            raise CheckpointError(
                f"{path}: {name} points to {quoted(file_name)}, which is not the path of a "
                f"*{SUFFIX} file inside the folder"
            )
    weight_map = {name: PurePosixPath(file).as_posix() for name, file in weight_map.items()}
    metadata = content.get("metadata")
    return WeightFiles(
        sorted(set(weight_map.values())),
        weight_map,
        metadata if isinstance(metadata, dict) else {},
    )


def _is_inside(path: str) -> bool:
    """Whether an entry is a file in the folder or below it, and none that is hidden."""
    parts = PurePosixPath(path).parts  # without "."
    return (
        is_safetensors(path)
        and not path.endswith("/")
        and path.isprintable()
        and "\\" not in path
        and len(path) <= _MAX_PATH
        and not any(part.startswith((".", "/")) or len(part) > _MAX_FILE_NAME for part in parts)
    )
