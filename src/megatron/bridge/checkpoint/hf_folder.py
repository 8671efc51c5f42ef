"""Writing a Hugging Face folder laid out like a reference: weights, weight index, side files."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.checkpoint.safetensors_writer import plan_shards, write_index, write_shard
from megatron.bridge.models.conversion.plan import TensorSpec
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.fp8 import CONFIG_KEY
from megatron.bridge.models.hf_pretrained.tensors import INDEX_FILE
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of tensor data per file where no reference says how to split, as on the Hub."""


def write_weights(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    reference: PreTrainedVLM,
    read: "Callable[[str], torch.Tensor]",
) -> None:
    """Write every tensor, each asked of `read` when it is its turn.

    A reference whose files hold the same tensors decides files, order, header metadata and index,
    so that equal tensors give equal files. Otherwise files are filled up to MAX_SHARD_BYTES.
    """
    size = sum(spec.nbytes for spec in tensors.values())
    if not reference.has_weights or set(reference.tensors) != set(tensors):
        shards = plan_shards(tensors.values(), MAX_SHARD_BYTES)
        for file_name, specs in shards.items():
            write_shard(folder / file_name, specs, read, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
            write_index(folder / INDEX_FILE, weight_map, size)
        return
    index = reference.tensors
    for shard in index.shards:
        specs = [tensors[name] for name in shard.names]
        write_shard(folder / shard.file_name, specs, read, shard.metadata)
    if index.index_metadata is None:
        return
    if size == index.total_bytes:
        # The same names lie in the same files, so the index is the reference's own.
        shutil.copyfile(index.folder / INDEX_FILE, folder / INDEX_FILE)
    else:
        weight_map = {name: shard.file_name for shard in index.shards for name in shard.names}
        write_index(folder / INDEX_FILE, weight_map, size, index.index_metadata)


def write_side_files(folder: Path, reference: PreTrainedVLM, *, quantized: bool = False) -> None:
    """Copy config, tokenizer, processor, chat template and whatever else is not weights.

    A reference that is only a config is written as config.json. quantized: whether the weights
    beside them are; if not, config.json does not say so either.
    """
    restated = reference.hf_config.has(CONFIG_KEY) and not quantized
    if restated or not reference.has_files:
        config = reference.hf_config if quantized else reference.unquantized_config
        text = json.dumps(config.data, indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    for file in reference.side_files:
        if restated and file == Path(CONFIG_FILE):
            continue
        destination = folder / file
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reference.folder / file, destination)
