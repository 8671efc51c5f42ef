"""Random weights of a model, of the names and shapes that transformers gives its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.checkpoint.safetensors_writer import (
    name_shards,
    plan_shards,
    tensor_bytes,
    write_index,
    write_shard,
)
from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.tensors import INDEX_FILE

if TYPE_CHECKING:
    import torch

_ELEMENTS_AT_A_TIME = 1 << 22
"""Drawn in float32 before rounding; part of what makes a seed's numbers, so never change it."""


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor to be made; `dtype` is the safetensors name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def random_tensors(config: Mapping[str, Any], dtype: str) -> list[RandomTensor]:
    """The tensors on disk of a model with this config.json, in torch dtype `dtype` (its name).

    Names and shapes are those of transformers' class, built without memory on the meta device.
    A tied head has no tensor of its own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = dict(config)
    model_config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config)
    name = safetensors_dtype(getattr(torch, dtype))
    absent = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    return [
        RandomTensor(key, tuple(tensor.shape), name)
        for key, tensor in model.state_dict().items()
        if key not in absent
    ]


def write_weights(
    folder: Path, tensors: Sequence[RandomTensor], num_shards: int, max_shard_size: int, seed: int
) -> None:
    """Write shards, and the index if they are several, one tensor at a time.

    With `num_shards` 0 a shard holds up to `max_shard_size` bytes. Raises InputError if there
    are fewer tensors than shards.
    """
    shards = (
        name_shards(_split(tensors, num_shards))
        if num_shards
        else plan_shards(tensors, max_shard_size)
    )
    by_name = {tensor.name: tensor for tensor in tensors}

    def draw(name: str) -> torch.Tensor:
        return random_values(by_name[name], seed)

    for file_name, specs in shards.items():
        write_shard(folder / file_name, specs, draw, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
        write_index(folder / INDEX_FILE, weight_map, sum(map(tensor_bytes, tensors)))


def random_values(tensor: RandomTensor, seed: int) -> torch.Tensor:
    """The values of one tensor; they depend on its name, shape and the seed alone.

    Normal: around 1 with deviation 0.1 for the weights of norms, around 0 with 0.1 for biases,
    and with 1/sqrt(fan in) for matrices, so that activations keep their size.
    """
    import torch

    digest = hashlib.sha256(f"{seed}:{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    is_vector = len(tensor.shape) == 1
    mean = 1.0 if is_vector and tensor.name.endswith(".weight") else 0.0
    deviation = 0.1 if is_vector else 1 / sqrt(prod(tensor.shape[1:]))
    result = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    for part in torch.split(result.view(-1), _ELEMENTS_AT_A_TIME):
        part.copy_(torch.empty(part.shape).normal_(mean, deviation, generator=generator))
    return result


def _split(tensors: Sequence[RandomTensor], count: int) -> list[list[RandomTensor]]:
    """Cut the sequence into `count` parts of about the same bytes, none of them empty."""
    if len(tensors) < count:
        raise InputError(f"num_shards is {count}, but there are only {len(tensors)} tensors")
    total = sum(map(tensor_bytes, tensors))
    parts: list[list[RandomTensor]] = [[]]
    done = 0
    for position, tensor in enumerate(tensors):
        missing_parts = count - len(parts)
        if parts[-1] and missing_parts:
            full = done * count >= total * len(parts)
            if full or len(tensors) - position == missing_parts:
                parts.append([])
        parts[-1].append(tensor)
        done += tensor_bytes(tensor)
    return parts
