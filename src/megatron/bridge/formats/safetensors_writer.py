"""Writing safetensors: shards streamed tensor by tensor, the plan of shards, the weight index.

The order of tensors and the JSON are those of `safetensors.torch.save_file`, so a shard that it
wrote and that was read with `TensorIndex` is written back byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron.bridge.dtypes import itemsize, safetensors_dtype
from megatron.bridge.errors import CheckpointError, TargetExists
from megatron.bridge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    import torch

_HEADER_ALIGNMENT = 8


def write_shard(
    path: Path,
    specs: Sequence[TensorSpec],
    tensor: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file: the tensors of `specs` in this order, each asked for when it is its turn.

    One tensor is in memory at a time. The file is flushed to the disk; if anything fails, it is
    removed.

    Args:
        path: of the file.
        specs: its tensors.
        tensor: gives the tensor of a name.
        metadata: of the header; None leaves the entry out.

    Raises:
        TargetExists: `path` exists.
        CheckpointError: a name is given twice, a tensor's dtype or shape is not as specified, or
            the file cannot be written.
    """
    header = shard_header(path.name, specs, metadata)
    try:
        file = path.open("xb")
    except FileExistsError:
        raise TargetExists(f"{path} exists already") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with file:
            file.write(header)
            for spec in specs:
                _write_tensor(file, spec, tensor(spec.name))
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def split_into_shards[Spec: TensorSpec](
    specs: Iterable[Spec], max_shard_size: int
) -> dict[str, list[Spec]]:
    """Distribute tensors over files that are named as transformers does.

    A file is filled in the given order up to `max_shard_size` bytes of data; a larger tensor gets a
    file of its own.

    Returns:
        The tensors of each file in the order of their data, by the file's name:
        `model.safetensors`, or `model-00001-of-0000N.safetensors`.
    """
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        nbytes = spec.nbytes
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += nbytes
    return name_shards(shards)


def name_shards[Spec: TensorSpec](shards: Sequence[Iterable[Spec]]) -> dict[str, list[Spec]]:
    """Name the files as transformers does, and order their tensors as safetensors does."""
    count = len(shards)
    return {
        "model.safetensors"
        if count == 1
        else f"model-{number:05}-of-{count:05}.safetensors": sorted(
            # Wide types first, so that every tensor is aligned.
            shard,
            key=lambda spec: (-itemsize(spec.dtype), spec.name),
        )
        for number, shard in enumerate(shards, start=1)
    }


def index_text(
    weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any] | None = None
) -> str:
    """The content of `model.safetensors.index.json`, formatted as transformers does.

    Args:
        weight_map: the file of each tensor, by the tensor's name.
        total_size: bytes of tensor data.
        metadata: further entries of the index's metadata; a `total_size` in it is replaced.
    """
    content = {
        "metadata": {**(metadata or {}), "total_size": total_size},
        "weight_map": dict(weight_map),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write `model.safetensors.index.json`, see `index_text`.

    Raises:
        TargetExists: `path` exists.
        CheckpointError: the file cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(index_text(weight_map, total_size))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise TargetExists(f"{path} exists already") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error


def shard_header(
    file_name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None
) -> bytes:
    """The header of a file, with its length before it.

    Raises:
        CheckpointError: a name is given twice, or is a reserved one.
    """
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for spec in specs:
        if spec.name in entries:
            raise CheckpointError(f"{file_name}: {spec.name} is given twice, or is a reserved name")
        end = begin + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, spec: TensorSpec, tensor: torch.Tensor) -> None:
    from megatron.bridge.tensors.arrays import memory_of
    from megatron.bridge.tensors.torch_views import as_array

    found = safetensors_dtype(tensor.dtype), tuple(tensor.shape)
    if found != (spec.dtype, tuple(spec.shape)):
        raise CheckpointError(
            f"{spec.name}: expected {spec.form}, found {found[0]} of shape {found[1]}"
        )
    file.write(memory_of(as_array(tensor.cpu().contiguous())))
