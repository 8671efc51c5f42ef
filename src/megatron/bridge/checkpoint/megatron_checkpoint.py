"""Live Megatron models to and from torch_dist checkpoints."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.checkpoint.interruption import done_means_done
from megatron.bridge.checkpoint.live_model import LiveTensors, LocalTensor, local_tensors
from megatron.bridge.checkpoint.megatron_folder import megatron_files
from megatron.bridge.checkpoint.staging import staged_folder
from megatron.bridge.checkpoint.stream import write_files
from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
from megatron.bridge.dtypes import can_be_cast, safetensors_dtype
from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.boxes import (
    Box,
    box_shape,
    full_box,
    intersect,
    relative,
    slices,
)
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.layer_keys import stored_place
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.config import HFConfig


@torch.no_grad()
@done_means_done()
def save_checkpoint(
    source: LiveTensors,
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
    files = megatron_files(
        plan,
        provider=provider,
        settings=settings,
        hf_config=hf_config,
        tensors={key: source.tensors.get(key, spec) for key, spec in plan.megatron.items()},
    )
    with staged_folder(target, force=force) as staged:
        write_files(staged, files, source.read_into)


@torch.no_grad()
def load_checkpoint(
    model: Sequence[torch.nn.Module],
    source: Path | TorchDistCheckpoint,
    *,
    layer_paths: Collection[str] = (),
    casting: Casting = EXACTLY,
) -> None:
    """Fill a model from a torch_dist checkpoint, whatever layout it was written with.

    Each rank reads only what it holds. A vocabulary that was padded to another size is cut or
    filled up with zeros. layer_paths: of the model's layers, whose keys may be formed in another
    way than the model's (`stored_place`). casting: of values that the model's parameters do not
    hold. Raises CheckpointError if the checkpoint is damaged, PlanError if it does not hold the
    model, InexactCast.
    """
    checkpoint = source if isinstance(source, TorchDistCheckpoint) else TorchDistCheckpoint(source)
    stored = checkpoint.tensors
    tensors = [
        (local, *stored_place(local.key, local.box, stored.keys(), layer_paths))
        for local in local_tensors(model)
    ]
    if problems := list(_misfits(tensors, stored)):
        raise PlanError(problems, heading=f"{checkpoint.folder} does not hold this model")
    for local, key, box in tensors:
        found = intersect(box, full_box(stored[key].shape))
        data = local.data.reshape(box_shape(box))
        if found != box:
            data.zero_()
        if found is not None:
            part = casting.cast(checkpoint.read(key, found), data.dtype, key)
            data[slices(relative(found, box))] = part


def _misfits(
    tensors: Sequence[tuple[LocalTensor, str, Box]], stored: Mapping[str, TensorSpec]
) -> Iterator[str]:
    for local, key, box in tensors:
        spec = stored.get(key)
        if spec is None:
            yield f"{local.key}: missing from the checkpoint"
            continue
        # Keys that are formed in another way differ by the axis of the layer only.
        shape = local.key_shape[max(len(local.box) - len(box), 0) :]
        there = spec.shape[max(len(box) - len(local.box), 0) :]
        if there != shape and not (local.is_padded and there[1:] == shape[1:]):
            yield f"{local.key}: the model has shape {local.key_shape}, the file {spec.shape}"
        elif not can_be_cast(safetensors_dtype(local.data.dtype), spec.dtype):
            yield f"{local.key}: the model has {local.data.dtype}, the file {spec.dtype}"
