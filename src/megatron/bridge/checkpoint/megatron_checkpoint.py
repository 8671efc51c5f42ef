"""Live Megatron models to and from torch_dist checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from megatron.bridge.checkpoint.config_record import write_config_record
from megatron.bridge.checkpoint.iterations import iteration_folder, write_tracker
from megatron.bridge.checkpoint.live_model import local_tensors, reader
from megatron.bridge.checkpoint.staging import staged_folder
from megatron.bridge.checkpoint.torch_dist_writer import write_torch_dist
from megatron.bridge.dtypes import safetensors_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.runtime.cpu import megatron_on_cpu


@torch.no_grad()
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
        key: replace(spec, dtype=dtypes.get(key, spec.dtype))
        for key, spec in plan.megatron.items()
    }
    read = reader(model, replace(plan, megatron=tensors))
    with staged_folder(target, force=force) as staged:
        folder = write_tracker(staged, iteration=0)
        write_torch_dist(
            folder,
            tensors,
            ((parameter.key, parameter.box) for parameter in plan.parameters),
            lambda key, box: read(key, box).cpu(),
            extra_states=plan.extra_states,
        )
        write_config_record(folder, provider, settings, hf_config)


def load_checkpoint(model: Sequence[torch.nn.Module], source: Path) -> None:
    """Fill a model by megatron-core's own load, whatever layout the checkpoint was written with.

    Raises CheckpointError if there is none, InputError if it does not hold the model.
    """
    folder = iteration_folder(source)
    for chunk in unwrap_model(list(model)):
        with megatron_on_cpu():
            try:
                state = dist_checkpointing.load(chunk.sharded_state_dict(), str(folder))
            except (KeyError, dist_checkpointing.core.CheckpointingException) as error:
                raise InputError(f"{folder} does not hold this model: {error}") from error
        chunk.load_state_dict({key: state[key] for key in chunk.state_dict() if key in state})
