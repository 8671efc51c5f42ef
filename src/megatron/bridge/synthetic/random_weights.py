"""Random weights of a model, streamed to safetensors shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.safetensors_writer import (
    name_shards,
    split_into_shards,
    write_index,
    write_shard,
)
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE
from megatron.bridge.synthetic import quantize
from megatron.bridge.synthetic.disk_tensors import DiskTensor, RandomTensor

if TYPE_CHECKING:
    import torch

_ELEMENTS_AT_A_TIME = 1 << 22
"""Drawn in float32 before rounding; part of what makes a seed's numbers, so never change it."""


def write_weights(
    folder: Path, tensors: Sequence[DiskTensor], num_shards: int, max_shard_size: int, seed: int
) -> None:
    """Write shards, and the index if they are several, one tensor at a time.

    Args:
        folder: the folder of the model.
        tensors: the tensors on disk, in their order.
        num_shards: number of shards; 0 for as many as `max_shard_size` makes.
        max_shard_size: bytes that a shard holds at most, where `num_shards` is 0.
        seed: seed of the random weights.

    Raises:
        InputError: there are fewer tensors than shards.
    """
    shards = (
        name_shards(_split(tensors, num_shards))
        if num_shards
        else split_into_shards(tensors, max_shard_size)
    )
    by_name = {tensor.name: tensor for tensor in tensors}

    def draw(name: str) -> torch.Tensor:
        return disk_values(by_name[name], seed)

    for file_name, specs in shards.items():
        write_shard(folder / file_name, specs, draw, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
        write_index(folder / INDEX_FILE, weight_map, sum(tensor.nbytes for tensor in tensors))


def disk_values(tensor: DiskTensor, seed: int) -> torch.Tensor:
    """The values of one tensor on disk, in its shape and dtype."""
    import torch

    if not tensor.fused:
        ((single,),) = tensor.experts
        return _stored(random_values(single, seed), tensor)
    result = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device="cpu")
    # One expert at a time: the largest tensor is not held twice.
    for target, expert in zip(result, tensor.experts, strict=True):
        target.copy_(_stored(torch.cat([random_values(part, seed) for part in expert]), tensor))
    return result


def _stored(matrix: torch.Tensor, tensor: DiskTensor) -> torch.Tensor:
    """What `tensor` stores of one matrix."""
    if tensor.content != "values":
        scale_dtype = torch_dtype(tensor.scale_dtype)
        values, scales = quantize.quantize(matrix, scale_dtype)
        matrix = values if tensor.content == "fp8-values" else scales
    return matrix.T if tensor.transposed else matrix


def random_values(tensor: RandomTensor, seed: int) -> torch.Tensor:
    """The values of one tensor; they depend on its name, shape and the seed alone.

    They are normal: around 1 with deviation 0.1 for the weights of norms, around 0 with 0.1 for
    those of zero-centred norms, biases and other vectors, and around 0 with 1/sqrt(fan in) for
    matrices, so that activations keep their size.
    """
    import torch

    digest = hashlib.sha256(f"{seed}:{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    is_vector = len(tensor.shape) == 1
    is_scale = is_vector and tensor.name.endswith(".weight") and not tensor.zero_centred
    mean = 1.0 if is_scale else 0.0
    deviation = 0.1 if is_vector else 1 / sqrt(prod(tensor.shape[1:]))
    result = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device="cpu")
    for part in torch.split(result.view(-1), _ELEMENTS_AT_A_TIME):
        part.copy_(
            torch.empty(part.shape, device="cpu").normal_(mean, deviation, generator=generator)
        )
    return result


def _split(tensors: Sequence[DiskTensor], count: int) -> list[list[DiskTensor]]:
    """Cut the sequence into `count` parts of about the same bytes, none of them empty."""
    if len(tensors) < count:
        raise InputError(f"num_shards is {count}, but there are only {len(tensors)} tensors")
    total = sum(tensor.nbytes for tensor in tensors)
    parts: list[list[DiskTensor]] = [[]]
    done = 0
    for position, tensor in enumerate(tensors):
        missing_parts = count - len(parts)
        if parts[-1] and missing_parts:
            full = done * count >= total * len(parts)
            if full or len(tensors) - position == missing_parts:
                parts.append([])
        parts[-1].append(tensor)
        done += tensor.nbytes
    return parts
