"""Live Megatron models to and from torch_dist checkpoints."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.dtypes import TORCH_NAME_OF, can_be_cast, safetensors_dtype
from megatron.bridge.engine.stream import write_files
from megatron.bridge.errors import PlanError
from megatron.bridge.exchange.roster import Roster, Shard, global_tensors
from megatron.bridge.formats.config_record import TokenizerRecord
from megatron.bridge.formats.file_plans import as_stored, weight_tensors
from megatron.bridge.formats.megatron_folder import megatron_files
from megatron.bridge.formats.torch_dist.file_layout import writer_of
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.live.local_tensors import LiveTensors, LocalTensor, local_tensors
from megatron.bridge.live.shared_staging import staged_by_ranks
from megatron.bridge.live.weights import plan_of_model, planned_tensors
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.layer_keys import stored_place
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config_dtype import config_in_dtype
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.runtime.parallel import ranks_of_model
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.targets import check_target
from megatron.bridge.tensors.boxes import (
    Box,
    box_shape,
    full_box,
    intersect,
    relative,
    slices,
)
from megatron.bridge.tensors.source import read_box
from megatron.bridge.tensors.spec import TensorSpec, differences, main_dtype, widened
from megatron.bridge.tensors.torch_views import as_torch, numpy_dtype_of


@torch.no_grad()
@done_means_done()
def save_model(
    model: Sequence[torch.nn.Module],
    target: Path,
    hf: PreTrainedVLM,
    *,
    experts: str | None = None,
    tokenizer: TokenizerRecord | None = None,
    force: bool = False,
) -> None:
    """Write the weights of a model, in its own dtypes, as target/iter_0000000.

    Every rank calls this, and writes what it holds the main replica of, in files of its own.

    Args:
        model: the chunks of this rank.
        target: the folder, which is complete or not there; all ranks see it.
        hf: what the model was made of, for the config record.
        experts: see `plan_of_model`.
        tokenizer: for the config record.
        force: replace a target that exists.

    Raises:
        TargetExists: the target exists, and `force` is not set.
        PlanError: the ranks do not hold the model.
        InputError: another rank cannot go on.
    """
    ranks = ranks_of_model()

    def planned() -> tuple[ConversionPlan, list[LocalTensor]]:
        check_target(target, [hf.name_or_path], force=force)
        plan = plan_of_model(hf, model, experts=experts)
        return plan, planned_tensors(model, plan)

    plan, tensors = ranks.together(planned)
    roster = Roster.of(ranks, tensors)
    roster.check_held_once(plan.megatron)
    held = global_tensors(roster.main_shards)
    saved = TORCH_NAME_OF[main_dtype(held.values())]
    files = megatron_files(
        plan,
        provider=bridge_for(hf.hf_config.architecture).provider,
        settings=_provider_settings(hf, plan, held),
        hf_config=config_in_dtype(hf.unquantized_config, saved),
        tokenizer=tokenizer,
        tensors={key: held[key] for key in plan.megatron},
        chunks=[_in_order(plan, roster.main_of(rank)) for rank in range(len(roster.by_rank))],
    )
    own = [file for file in files if writer_of(file.name) == ranks.index]
    source = LiveTensors(one for one in tensors if one.is_main)
    with staged_by_ranks(target, ranks, force=force) as staged:
        ranks.together(lambda: write_files(staged, own, source.read_into))


def _in_order(plan: ConversionPlan, shards: Iterable[Shard]) -> list[tuple[str, Box]]:
    """Boxes in the order of the plan, whatever the order of the model's modules."""
    place = {key: number for number, key in enumerate(plan.megatron)}
    return sorted(((one.key, one.box) for one in shards), key=lambda one: (place[one[0]], one[1]))


def provider_of_checkpoint(
    checkpoint: TorchDistCheckpoint, hf: PreTrainedVLM, dtype: str | None, casting: Casting
) -> ModelProvider:
    """A provider whose models are filled from a torch_dist checkpoint of any layout.

    Args:
        checkpoint: the checkpoint.
        hf: the Hugging Face side of the model; its files are not read.
        dtype: of the model, None for that of the checkpoint.
        casting: of values that the model's parameters do not hold.

    Raises:
        PlanError: the checkpoint does not hold this model.
        CheckpointError: it cannot be read.
    """
    bridge, config = bridge_for(hf.hf_config.architecture), hf.hf_config
    found = weight_tensors(checkpoint)
    options = bridge.options_of_checkpoint(found)
    plan = bridge.plan_from_config(config, main_dtype(found.values()), options)
    if problems := list(differences(plan.megatron, found)):
        raise PlanError(problems, heading=f"{checkpoint.folder} does not hold this model")
    provider = bridge.provider_of(_provider_settings(hf, plan, found, dtype))
    paths = bridge.layer_paths
    provider.register_pre_wrap_hook(
        lambda model: load_checkpoint(model, checkpoint, layer_paths=paths, casting=casting),
        fills=True,
    )
    return provider


def _provider_settings(
    hf: PreTrainedVLM,
    plan: ConversionPlan,
    stored: Mapping[str, TensorSpec],
    dtype: str | None = None,
) -> dict[str, Any]:
    """Fields of the provider for a model that holds what is `stored`, by key.

    In a given `dtype` of the model, parameters with a dtype of their own keep it where it is wider.
    """
    tensors = as_stored(plan, stored)
    if dtype is not None:
        tensors = widened(tensors, dtype)
    bridge = bridge_for(hf.hf_config.architecture)
    return bridge.provider_settings(hf.hf_config, dtype or main_dtype(stored.values()), tensors)


@torch.no_grad()
def load_checkpoint(
    model: Sequence[torch.nn.Module],
    checkpoint: TorchDistCheckpoint,
    *,
    layer_paths: Collection[str] = (),
    casting: Casting = EXACTLY,
) -> None:
    """Fill a model from a torch_dist checkpoint, whatever layout it was written with.

    Every rank calls this, and reads only what it holds. A vocabulary that was padded to another
    size is cut or filled up with zeros.

    Args:
        model: the chunks of this rank.
        checkpoint: the checkpoint.
        layer_paths: of the model's layers, whose keys may be formed in another way than the model's
            (`stored_place`).
        casting: of values that the model's parameters do not hold.

    Raises:
        CheckpointError: the checkpoint is damaged.
        PlanError: it does not hold the model.
        InexactCast: see `casting`.
    """
    ranks, stored = ranks_of_model(), checkpoint.tensors

    def placed() -> list[tuple[LocalTensor, str, Box]]:
        tensors = [
            (local, *stored_place(local.key, local.box, stored.keys(), layer_paths))
            for local in local_tensors(model)
        ]
        if problems := list(_misfits(tensors, stored)):
            raise PlanError(problems, heading=f"{checkpoint.folder} does not hold this model")
        return tensors

    tensors = ranks.together(placed)
    roster = Roster.of(ranks, [local for local, _, _ in tensors])
    roster.check_held(global_tensors(roster.shards))

    def fill() -> None:
        for local, key, box in tensors:
            found = intersect(box, full_box(stored[key].shape))
            data = local.data.reshape(box_shape(box))
            if found != box:
                data.zero_()
            if found is not None:
                part = casting.cast(read_box(checkpoint, key, found), numpy_dtype_of(data), key)
                data[slices(relative(found, box))] = as_torch(part)

    ranks.together(fill)


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
