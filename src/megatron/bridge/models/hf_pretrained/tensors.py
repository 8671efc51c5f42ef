"""All tensors of a model folder: an index made from the shards' headers, and reading by slice.

    with TensorIndex.from_folder(folder) as tensors:
        info = tensors["lm_head.weight"]                          # shape, dtype, file
        rows = tensors.read("lm_head.weight", ((0, 128), (0, info.shape[1])))

Making the index reads headers only and imports no torch; all problems are in one error.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.regular_file import open_regular
from megatron.bridge.models.hf_pretrained.safetensors_header import (
    Header,
    TensorInfo,
    read_header,
)
from megatron.bridge.models.hf_pretrained.weight_files import SINGLE_FILE, SUFFIX, WeightFiles
from megatron.bridge.tensors.boxes import Box, full_box
from megatron.bridge.tensors.spec import TensorSpec, check_box
from megatron.bridge.text.quoting import printable

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.hf_pretrained.slice_reader import SliceReader
    from megatron.bridge.tensors.arrays import Array

_BLOCK_BYTES = 4 << 20

__all__ = ["ReadableTensors", "Shard", "TensorIndex", "TensorInfo"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header's metadata (None if there is none), its tensors in data order."""

    file_name: str
    metadata: Mapping[str, str] | None
    names: tuple[str, ...]


class ReadableTensors[Spec: TensorSpec](Mapping[str, Spec], ABC):
    """Tensors of files by name, that are read by box: a Source."""

    @abstractmethod
    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") in which a tensor is read. Raises CheckpointError if unknown."""

    @abstractmethod
    def place(self, name: str) -> TensorInfo | None:
        """Where the bytes lie that are read of a tensor; None if they are computed.

        Raises:
            CheckpointError: the name is unknown.
        """

    @abstractmethod
    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Read the part of a tensor inside `box` into `out`. Safe to call from several threads.

        Args:
            name: of the tensor.
            box: one half-open range (start, stop) per axis.
            out: of the shape and dtype of the part, with any strides.

        Raises:
            CheckpointError: the name is unknown, the box sticks out of the tensor, or the file
                changed since it was indexed.
        """

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Read a tensor, or the part of it inside `box`, as a torch tensor.

        Only the bytes of the part are read.

        Args:
            name: of the tensor.
            box: one half-open range (start, stop) per axis; None for the whole tensor.

        Returns:
            A contiguous tensor on the CPU, which shares memory with nothing.

        Raises:
            CheckpointError: as `read_into`.
        """
        from megatron.bridge.tensors.torch_views import read_tensor

        self.dtype_of(name)
        box = full_box(self[name].shape) if box is None else tuple(box)
        check_box(self[name], box)
        return read_tensor(self, name, box)


class TensorIndex(ReadableTensors[TensorInfo]):
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

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Index the weights of `folder`, see `weight_files`.

        What the headers of the files say counts, as it does for transformers: a weight index names
        the files, and its `metadata` means nothing. Symlinked files are followed: the hub's cache
        is made of them.

        Raises:
            CheckpointError: with every problem: no weights or ambiguous ones; an invalid index; an
                entry that leads out of the folder; a file that is missing, truncated or damaged; a
                tensor in two of them that is not the same in both.
        """
        files = WeightFiles.of(folder)
        problems: list[str] = []
        headers = _read_headers(folder, files.names, problems)
        next_step = "download the files named here again, or mend them" if problems else ""
        problems += _doubled(headers)
        if not problems and not any(header.tensors for header in headers.values()):
            problems.append(f"{printable(files.names[0])}: it holds no tensors")
        if problems:
            heading = "; ".join(filter(None, ["the weights cannot be used", next_step]))
            raise CheckpointError.of_problems(f"{folder}: {heading}", problems)
        return cls(folder, headers, None if files.index is None else files.metadata)

    @property
    def files_as_released(self) -> bool:
        """Whether transformers finds the files by their names."""
        names = [shard.file_name for shard in self.shards]
        indexed = self.index_metadata is not None and all(n.endswith(SUFFIX) for n in names)
        return indexed or names == [SINGLE_FILE]

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") of a tensor. Raises CheckpointError for an unknown name."""
        return self._known(name).dtype

    def place(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises CheckpointError for an unknown name."""
        return self._known(name)

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """See ReadableTensors.read_into."""
        self._reader.read_into(self._known(name), box, out)

    @cached_property
    def _reader(self) -> SliceReader:
        from megatron.bridge.models.hf_pretrained.slice_reader import SliceReader  # needs numpy

        return SliceReader()

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


def _read_headers(folder: Path, file_names: list[str], problems: list[str]) -> dict[str, Header]:
    """The readable headers; what is wrong with the others is added to `problems`."""
    headers = {}
    for file_name in file_names:
        try:
            headers[file_name] = read_header(folder / file_name)
        except CheckpointError as error:
            problems.append(str(error))
    return headers


def _doubled(headers: Mapping[str, Header]) -> list[str]:
    """The tensors that are in more than one file, and not the same in each."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for file_name, header in headers.items():
        for tensor in header.tensors:
            found.setdefault(tensor.name, {})[file_name] = tensor
    problems = []
    for name, copies in found.items():
        first, *others = copies.values()
        if not all(_same(first, other) for other in others):
            shown = ", ".join(map(printable, copies))
            problems.append(f"{name}: it is in {len(copies)} shards, {shown}, which differ in it")
    return problems


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with open_regular(one.file) as first, open_regular(other.file) as second:
        for start in range(0, one.nbytes, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, one.nbytes - start)
            parts = (
                os.pread(file.fileno(), size, tensor.offset + start)
                for file, tensor in ((first, one), (second, other))
            )
            if next(parts) != next(parts):
                return False
    return True
