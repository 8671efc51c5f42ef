"""Live Megatron models to and from torch_dist checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.checkpoint.interruption import done_means_done
from megatron.bridge.checkpoint.live_model import LiveTensors, LocalTensor, local_tensors
from megatron.bridge.checkpoint.megatron_folder import megatron_files
from megatron.bridge.checkpoint.staging import staged_folder
from megatron.bridge.checkpoint.stream import write_files
from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.boxes import (
    box_shape,
    full_box,
    intersect,
    relative,
    slices,
)
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.config import HFConfig


@torch.no_grad()
@done_means_done()
def save_checkpoint(
    model: Sequence[torch.nn.Module],
    target: Path,
    plan: ConversionPlan,
    *,
    provider: str,
    settings: Mapping[str, Any],
    hf_config: HFConfig,
    force: bool = False,
) -> None:
    """Write the weights of a model, in its own dtypes, as target/iter_0000000.

    plan: of the model. provider, settings, hf_config: for the config record. Raises TargetExists,
    or InputError if this rank does not hold all of the model.
    """
    dtypes = {local.key: safetensors_dtype(local.data.dtype) for local in local_tensors(model)}
    tensors = {
        key: replace(spec, dtype=dtypes.get(key, spec.dtype)) for key, spec in plan.megatron.items()
    }
    source = LiveTensors(model, replace(plan, megatron=tensors))
    files = megatron_files(
        plan, provider=provider, settings=settings, hf_config=hf_config, tensors=tensors
    )
    with staged_folder(target, force=force) as staged:
        write_files(staged, files, source.read_into)


@torch.no_grad()
def load_checkpoint(model: Sequence[torch.nn.Module], source: Path) -> None:
    """Fill a model from a torch_dist checkpoint, whatever layout it was written with.

    Each rank reads only what it holds. A vocabulary that was padded to another size is cut or
    filled up with zeros. Raises CheckpointError if there is no checkpoint or it is damaged,
    PlanError if it does not hold the model.
    """
    checkpoint = TorchDistCheckpoint(source)
    tensors = local_tensors(model)
    if problems := list(_misfits(tensors, checkpoint.tensors)):
        raise PlanError(problems, heading=f"{checkpoint.folder} does not hold this model")
    for local in tensors:
        stored = intersect(local.box, full_box(checkpoint.tensors[local.key].shape))
        data = local.data.reshape(box_shape(local.box))
        if stored != local.box:
            data.zero_()
        if stored is not None:
            data[slices(relative(stored, local.box))] = checkpoint.read(local.key, stored)


def _misfits(tensors: Sequence[LocalTensor], stored: Mapping[str, TensorSpec]) -> Iterator[str]:
    for local in tensors:
        spec = stored.get(local.key)
        if spec is None:
            yield f"{local.key}: missing from the checkpoint"
        elif spec.shape != local.key_shape and not (
            local.is_padded and spec.shape[1:] == local.key_shape[1:]
        ):
            yield f"{local.key}: the model has shape {local.key_shape}, the file {spec.shape}"
        elif torch_dtype(spec.dtype) != local.data.dtype:
            yield f"{local.key}: the model has {local.data.dtype}, the file {spec.dtype}"
