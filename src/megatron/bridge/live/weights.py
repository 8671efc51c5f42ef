"""Weights of live Megatron models: filled from and read as Hugging Face tensors, by the plan."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.formats.file_plans import plan_of
from megatron.bridge.live.filling import fill_all
from megatron.bridge.live.local_tensors import LiveTensors, local_tensors, mismatches
from megatron.bridge.live.mismatched import without_mismatched
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.layer_keys import KeyForms
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import read_hf
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.wrapping import unwrapped
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.tensors.boxes import full_box
from megatron.bridge.tensors.source import Source
from megatron.bridge.tensors.torch_views import as_torch


def options_of_model(hf: PreTrainedVLM, model: Sequence[torch.nn.Module]) -> PlanOptions:
    """What a live model was built with: rows of the embedding, its parts, forms of keys."""
    bridge = bridge_for(hf.hf_config.architecture)
    keys = {local.key for local in local_tensors(model)}
    return replace(
        bridge.options_of_model(unwrapped(model)[0].config),
        keys=KeyForms.of(keys, bridge.layer_paths),
    )


def plan_of_model(
    hf: PreTrainedVLM,
    model: Sequence[torch.nn.Module],
    *,
    experts: str | None = None,
    dtype: DType | None = None,
) -> ConversionPlan:
    """The proven plan between `hf`, its files or its config, and a live model.

    Args:
        hf: the Hugging Face side.
        model: the chunks of this rank.
        experts: how routed experts lie in the files (ExpertLayout); None to find it out.
        dtype: of the Hugging Face tensors, None for those of the files. What the release keeps in
            float32 stays so.

    Raises:
        PlanError: files and config are not of one model.
        ConfigError: the config cannot be used.
        CheckpointError: the files cannot be read.
    """
    plan = plan_of(hf, replace(options_of_model(hf, model), experts=experts))
    if dtype is None:
        return plan
    bridge = bridge_for(hf.hf_config.architecture)
    return bridge.in_dtype(plan, hf.hf_config, weight_dtype(dtype))


def fill_from_files(
    model: Sequence[torch.nn.Module],
    hf: PreTrainedVLM,
    progress: Progress | None = None,
    *,
    experts: str | None = None,
    casting: Casting = EXACTLY,
    allowed: Collection[str] = (),
) -> None:
    """Fill this rank's chunks from the files of `hf`; see `plan_of_model` and `load_weights`.

    Raises:
        InputError: `hf` is a config without files.
    """
    if not hf.has_weights:
        raise InputError(f"{hf.name_or_path}: there are no weights to load")
    plan = plan_of_model(hf, model, experts=experts)
    load_weights(model, plan, hf.weights, progress, casting, allowed)


def load_weights(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    source: Source,
    progress: Progress | None = None,
    casting: Casting = EXACTLY,
    allowed: Collection[str] = (),
) -> None:
    """Fill this rank's parameters; each rank reads only the boxes that it holds.

    Values are cast to the dtype of the parameter.

    Args:
        model: the chunks of this rank.
        plan: of the model and the files.
        source: of Hugging Face tensors.
        progress: is told how many bytes are loaded.
        casting: of a norm's w - 1 that its parameter does not hold.
        allowed: parameters that may be others than those of the plan, see `without_mismatched`;
            they are left as they are.

    Raises:
        PlanError: before anything is written, if the model and the plan do not have the same
            tensors.
        InexactCast: see `casting`.
    """
    tensors = local_tensors(model)
    if allowed:
        plan, tensors = without_mismatched(plan, model, tensors, allowed)
    if problems := list(mismatches(plan, tensors)):
        raise PlanError(problems, heading="the model is not the one that the files hold")
    shown = progress or Silent()
    shown.start("load", sum(local.data.nbytes for local in tensors))
    fill_all(plan, tensors, source, casting, shown)


@torch.no_grad()
def export_weights(
    model: Sequence[torch.nn.Module], plan: ConversionPlan, casting: Casting = EXACTLY
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor that the model holds, by name, on the model's device.

    Args:
        model: the chunks of this rank.
        plan: of the model.
        casting: of values that the plan's dtypes do not hold.

    Yields:
        Name and tensor.

    Raises:
        PlanError: the model and the plan do not have the same tensors.
        InputError: this rank does not hold all of the model.
        InexactCast: see `casting`.
    """
    source = LiveTensors(model, plan)
    for name, spec in plan.hf.items():
        if name in plan.carried:
            continue
        yield name, as_torch(read_hf(plan, name, full_box(spec.shape), source, casting))
