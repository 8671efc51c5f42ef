"""Files of a model of any size in seconds: random weights in the released disk layout.

Weights are windows into one pool of random numbers, each with signs and mantissas flipped by a
key of its own: no two tensors are equal, nothing repeats within the reach of a compressor, and
making them costs less than writing them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cases import Case
from megatron.bridge.formats.safetensors_writer import (
    shard_header,
    split_into_shards,
    write_index,
)
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE
from megatron.bridge.synthetic.config_settings import resolve_settings
from megatron.bridge.synthetic.family import find_family

if TYPE_CHECKING:
    from megatron.bridge.synthetic.disk_tensors import DiskTensor

type Words = np.ndarray[tuple[int], np.dtype[np.uint64]]

_VERSION = 1
"""To be raised when the same case makes other files: those of earlier runs are made again."""

_ITEMSIZE = 2
_PER_WORD = 8 // _ITEMSIZE
_POOL_WORDS = 1 << 22
_BLOCK_WORDS = 1 << 21
_SIGN_AND_MANTISSA = 0x807F_807F_807F_807F
"""Of four bfloat16 numbers. Exponents stay, so that all numbers are of an ordinary size."""


class RandomWeights:
    """Bytes of bfloat16 tensors: normal with deviation 0.02, determined by the tensor's name."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        values = generator.standard_normal(_POOL_WORDS * _PER_WORD, dtype=np.float32) * 0.02
        self._pool: Words = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint64)

    def blocks(self, name: str, count: int) -> Iterator[memoryview]:
        """The bytes of `count` elements; a block is valid until the next one is asked for."""
        words = np.empty(min(_BLOCK_WORDS, -(-count // _PER_WORD)), np.uint64)
        left = count * _ITEMSIZE
        number = 0
        while left:
            digest = hashlib.sha256(f"{name}:{number}".encode()).digest()
            begin = int.from_bytes(digest[:8], "little") % (_POOL_WORDS - len(words) + 1)
            key = int.from_bytes(digest[8:16], "little") & _SIGN_AND_MANTISSA
            np.bitwise_xor(self._pool[begin : begin + len(words)], np.uint64(key), out=words)
            block = memoryview(words).cast("B")[:left]
            yield block
            left -= len(block)
            number += 1


@dataclass(frozen=True)
class ModelFiles:
    """The Hugging Face folder of a case, below `root`."""

    case: Case
    root: Path

    @property
    def folder(self) -> Path:
        """What the commands read."""
        return self.root / f"{self.case.name}-hf"

    @property
    def weights(self) -> list[str]:
        """Names of the files that hold weights, the index included."""
        return sorted(path.name for path in self.folder.glob("model*.safetensors*"))

    def file_bytes(self) -> int:
        """Bytes of these files."""
        return sum((self.folder / name).stat().st_size for name in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, whether the files are there or not."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @cached_property
    def _settings(self) -> Any:
        return resolve_settings(find_family(self.case.family), self.case.settings)

    @cached_property
    def _tensors(self) -> Sequence[DiskTensor]:
        from megatron.bridge.synthetic.disk_tensors import disk_tensors

        return disk_tensors(find_family(self.case.family), self._settings)

    @property
    def _note(self) -> Path:
        """Beside the folder: what it was made of, written when it is complete."""
        return self.root / f"{self.folder.name}.json"

    def ready(self) -> bool:
        """Whether an earlier run left these very files."""
        try:
            note = json.loads(self._note.read_text("utf-8"))
            found = {name: (self.folder / name).stat().st_size for name in note["files"]}
        except FileNotFoundError:
            return False
        return note == {"version": _VERSION, "config": self._settings.config, "files": found}

    def make(self) -> None:
        """Write the files, unless they are there; they are on the disk then."""
        if self.ready():
            return
        from megatron.bridge.synthetic.processors import write_side_files

        self.remove()
        self.folder.mkdir(parents=True)
        settings = self._settings
        family = find_family(self.case.family)
        write_side_files(self.folder, family, settings.config, settings.first_token_id)
        shards = split_into_shards(self._tensors, settings.options["max_shard_size"])
        random = RandomWeights()
        for file_name, tensors in shards.items():
            _write_shard(self.folder / file_name, tensors, random)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, group in shards.items() for tensor in group}
            write_index(self.folder / INDEX_FILE, weight_map, self.nbytes)
        files = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        note = {"version": _VERSION, "config": settings.config, "files": files}
        self._note.write_text(json.dumps(note), "utf-8")

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        self._note.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _write_shard(path: Path, tensors: Sequence[DiskTensor], random: RandomWeights) -> None:
    with path.open("wb") as file:
        file.write(shard_header(path.name, tensors, {"format": "pt"}))
        for tensor in tensors:
            if tensor.dtype != "BF16":
                raise ValueError(f"{tensor.name}: only BF16 is made here, found {tensor.dtype}")
            for block in random.blocks(tensor.name, prod(tensor.shape)):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
