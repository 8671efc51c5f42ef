"""Writing a Hugging Face folder laid out like a reference: weights, weight index, side files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.checkpoint.safetensors_writer import plan_shards, write_index, write_shard
from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.tensors import INDEX_FILE
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of tensor data per file where no reference says how to split, as on the Hub."""


def write_weights(
    folder: Path,
    plan: ConversionPlan,
    reference: PreTrainedVLM,
    read: "Callable[[str], torch.Tensor]",
) -> None:
    """Write every Hugging Face tensor of the plan, each asked of `read` when it is its turn.

    A reference with weights decides files, order, header metadata and index, so that equal tensors
    give equal files. Without, files are filled up to MAX_SHARD_BYTES.
    """
    if not reference.has_weights:
        shards = plan_shards(plan.hf.values(), MAX_SHARD_BYTES)
        for file_name, specs in shards.items():
            write_shard(folder / file_name, specs, read, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
            write_index(folder / INDEX_FILE, weight_map, plan.hf_bytes)
        return
    index = reference.tensors
    if set(index) != set(plan.hf):
        raise PlanError(sorted(set(index) ^ set(plan.hf)), heading="not the reference's tensors")
    for shard in index.shards:
        specs = [plan.hf[name] for name in shard.names]
        write_shard(folder / shard.file_name, specs, read, shard.metadata)
    if index.index_metadata is None:
        return
    if plan.hf_bytes == index.total_bytes:
        # The same names lie in the same files, so the index is the reference's own.
        shutil.copyfile(index.folder / INDEX_FILE, folder / INDEX_FILE)
    else:
        weight_map = {name: shard.file_name for shard in index.shards for name in shard.names}
        write_index(folder / INDEX_FILE, weight_map, plan.hf_bytes, index.index_metadata)


def write_side_files(folder: Path, reference: PreTrainedVLM) -> None:
    """Copy config, tokenizer, processor, chat template and whatever else is not weights.

    A reference that is only a config is written as config.json.
    """
    if not reference.has_files:
        text = json.dumps(reference.hf_config.data, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        return
    for file in reference.side_files:
        destination = folder / file
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reference.folder / file, destination)
