"""All tensors of a model folder: an index made from the shards' headers, and reading by slice.

    with TensorIndex.from_folder(folder) as tensors:
        info = tensors["lm_head.weight"]                          # shape, dtype, file
        rows = tensors.read("lm_head.weight", ((0, 128), (0, info.shape[1])))

Making the index reads headers only and imports no torch. Everything that the weight index claims
is checked against the files, and all problems are reported in one error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.errors import CheckpointError
from megatron.bridge.folding import listing
from megatron.bridge.models.hf_pretrained.other_formats import other_weights
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.safetensors_header import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    read_header,
)
from megatron.bridge.models.hf_pretrained.slice_reader import Box, SliceReader
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.quoting import is_name, printable, quoted

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Shard", "TensorIndex", "TensorInfo"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SUFFIX = ".safetensors"

_MAX_FILE_NAME = 255


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header's metadata (None if there is none), its tensors in data order."""

    file_name: str
    metadata: Mapping[str, str] | None
    names: tuple[str, ...]


class TensorIndex(Mapping[str, TensorInfo]):
    """Tensor name -> TensorInfo, over all shards of a folder.

    Iterates by file name, and within a file in the order of the data. Can be pickled; the copy
    opens its own file handles.
    """

    def __init__(
        self, folder: Path, headers: Mapping[str, Header], index_metadata: Mapping[str, Any] | None
    ) -> None:
        """Use `from_folder`: this takes headers that have been checked already."""
        self.folder = folder
        self.index_metadata = None if index_metadata is None else dict(index_metadata)
        """The `metadata` object of the weight index; None where there is no weight index."""
        ordered = sorted(headers.items())
        self.shards = tuple(
            Shard(
                file_name,
                header.metadata,
                tuple(tensor.name for tensor in header.tensors),
            )
            for file_name, header in ordered
        )
        self._tensors = {tensor.name: tensor for _, header in ordered for tensor in header.tensors}
        self.total_bytes = sum(tensor.nbytes for tensor in self._tensors.values())
        """Bytes of tensor data, without headers."""
        self._reader = SliceReader()

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Index the safetensors files of `folder`.

        With `model.safetensors.index.json` its shards are read, otherwise the only `*.safetensors`
        file. Raises CheckpointError, listing every problem: no weights or ambiguous ones; an
        invalid index; an entry that is no plain file name (symlinked files are followed: the hub's
        cache is made of them); a shard that is missing, truncated or damaged; a tensor that is in
        the index and not in its shard, or the reverse, or in two shards; a wrong `total_size`.
        """
        index_path = folder / INDEX_FILE
        if not os.path.lexists(index_path):
            file_name = _single_file(folder)
            problems: list[str] = []
            headers = _read_headers(folder, [file_name], problems)
            if not problems and not headers[file_name].tensors:
                problems.append(f"{printable(file_name)}: it holds no tensors")
            _raise_if_any(folder, problems)
            return cls(folder, headers, None)
        weight_map, metadata = _read_weight_index(index_path)
        problems = _unsafe_names(weight_map)
        _raise_if_any(folder, problems)
        headers = _read_headers(folder, sorted(set(weight_map.values())), problems)
        problems += _disagreements(weight_map, headers)
        problems += _files_not_indexed(folder, headers.keys() | set(weight_map.values()))
        if not problems:  # with tensors missing or doubled the sum would only repeat that
            problems += _wrong_total(metadata, headers)
        _raise_if_any(folder, problems)
        return cls(folder, headers, metadata)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Read a tensor, or the part of it inside `box`, into new memory on the CPU.

        `box` holds one half-open range (start, stop) per axis. Only its bytes are read. The result
        is contiguous, in the file's dtype, and shares memory with nothing.

        Raises CheckpointError for an unknown name, a box outside the tensor, or a file that
        changed since it was indexed.
        """
        return self._reader.read(self._known(name), box)

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") of a tensor. Raises CheckpointError for an unknown name."""
        return self._known(name).dtype

    def read_into(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Read the part of a tensor inside `box` into `out`, a view of its shape and dtype.

        `out` may have any strides. Safe to call from several threads. Raises CheckpointError as
        `read` does.
        """
        self._reader.read_into(self._known(name), box, out)

    def _known(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}")
        return info

    def close(self) -> None:
        """Close the file handles; a later read opens them again."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _raise_if_any(folder: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"{folder}: the weights cannot be used; download the files named here again, or mend "
            f"them:\n{listing(problems)}"
        )


def _safetensors_files(folder: Path) -> list[str]:
    names = (path.name for path in folder.glob(f"*{SUFFIX}"))
    return sorted(name for name in names if not name.startswith("."))


def _single_file(folder: Path) -> str:
    found = _safetensors_files(folder)
    if not found:
        raise CheckpointError(
            other_weights(folder)
            or f"{folder}: no safetensors weights; expected {INDEX_FILE} or {SINGLE_FILE}"
        )
    if len(found) > 1:
        shown = ", ".join([*found[:3], *(["..."] if len(found) > 3 else [])])
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files ({printable(shown)}) and no {INDEX_FILE} "
            "that says which belong to the model; fetch the index as well"
        )
    return found[0]


def _read_weight_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        content = parse_object(read_regular(path, MAX_HEADER_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: the weight index cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the weight index cannot be read: {error}; download it again"
        ) from error
    weight_map = content.get("weight_map")
    metadata = content.get("metadata", {})
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file_name, str) for file_name in weight_map.values())
    ):
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to file names; download it again"
        )
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: metadata must be an object; download it again")
    return weight_map, metadata


def _is_plain(file_name: str) -> bool:
    return (
        file_name.endswith(SUFFIX)
        and file_name.isprintable()
        and len(file_name) <= _MAX_FILE_NAME
        and not any(mark in file_name for mark in "/\\")
    )


def _unsafe_names(weight_map: Mapping[str, str]) -> list[str]:
    if unusable := [name for name in weight_map if not is_name(name)]:
        return [
            f"{INDEX_FILE}: {quoted(name)} is no name of a tensor: too long, or not printable"
            for name in unusable
        ]
    return [
        f"{INDEX_FILE}: {name} points to {quoted(file_name)}, "
        f"which is not a plain *{SUFFIX} file name inside the folder"
        for name, file_name in weight_map.items()
        if not _is_plain(file_name)
    ]


def _read_headers(folder: Path, file_names: list[str], problems: list[str]) -> dict[str, Header]:
    """The readable headers; what is wrong with the others is added to `problems`."""
    headers = {}
    for file_name in file_names:
        try:
            headers[file_name] = read_header(folder / file_name)
        except CheckpointError as error:
            problems.append(str(error))
    return headers


def _disagreements(weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> list[str]:
    """Differences between the index and the tensors of the shards that could be read."""
    files_of: dict[str, list[str]] = {}
    for file_name, header in headers.items():
        for tensor in header.tensors:
            files_of.setdefault(tensor.name, []).append(file_name)
    problems = []
    for name, file_name in weight_map.items():
        if file_name in headers and file_name not in files_of.get(name, []):
            elsewhere = files_of.get(name)
            problems.append(
                f"{name}: {INDEX_FILE} places it in {file_name}, "
                + (f"it is in {elsewhere[0]}" if elsewhere else "where it is missing")
            )
    for name, files in files_of.items():
        if name not in weight_map:
            problems.append(f"{name}: it is in {files[0]} but not in {INDEX_FILE}")
        if len(files) > 1:
            problems.append(f"{name}: it is in {len(files)} shards: {', '.join(files)}")
    return problems


def _files_not_indexed(folder: Path, indexed: set[str]) -> list[str]:
    return [
        f"{printable(file_name)}: {INDEX_FILE} does not mention this file; remove one or the other"
        for file_name in _safetensors_files(folder)
        if file_name not in indexed
    ]


def _wrong_total(metadata: Mapping[str, Any], headers: Mapping[str, Header]) -> list[str]:
    if "total_size" not in metadata:
        return []
    found = sum(tensor.nbytes for header in headers.values() for tensor in header.tensors)
    stated = metadata["total_size"]
    if stated == found:
        return []
    return [f"{INDEX_FILE}: metadata.total_size is {quoted(stated)}, the shards hold {found} bytes"]
