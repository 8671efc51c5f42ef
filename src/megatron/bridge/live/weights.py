"""Weights of live Megatron models: filled from and read as Hugging Face tensors, by the plan."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.file_plans import plan_of
from megatron.bridge.live.filling import fill_all
from megatron.bridge.live.local_tensors import (
    LiveTensors,
    LocalTensor,
    check_planned,
    local_tensors,
)
from megatron.bridge.live.mismatched import replaced_keys, without_keys
from megatron.bridge.live.ranks import Ranks
from megatron.bridge.live.roster import Roster
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
    if not model:
        raise InputError("model is an empty list; give the chunks that the provider built")
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

    def planned() -> ConversionPlan:
        if not hf.has_weights:
            raise InputError(f"{hf.name_or_path}: there are no weights to load")
        return plan_of_model(hf, model, experts=experts)

    load_weights(model, Ranks().together(planned), hf.weights, progress, casting, allowed)


def load_weights(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    source: Source,
    progress: Progress | None = None,
    casting: Casting = EXACTLY,
    allowed: Collection[str] = (),
) -> None:
    """Fill the parameters of all ranks; each reads only the boxes that it holds.

    Values are cast to the dtype of the parameter. Every rank calls this, and before anything is
    written it is proven that together they hold all of the model.

    Args:
        model: the chunks of this rank.
        plan: of the model and the files.
        source: of Hugging Face tensors.
        progress: is told how many bytes are loaded.
        casting: of a norm's w - 1 that its parameter does not hold.
        allowed: parameters that may be others than those of the plan, see `replaced_keys`;
            they are left as they are.

    Raises:
        PlanError: before anything is written, if the model and the plan do not have the same
            tensors.
        InputError: parameters are on the meta device; another rank cannot go on.
        InexactCast: see `casting`.
    """
    ranks, shown = Ranks(), progress or Silent()

    tensors = ranks.together(lambda: _with_memory(local_tensors(model)))
    replaced = ranks.all_of(lambda: replaced_keys(plan, model, tensors, allowed))
    filled, tensors = without_keys(plan, tensors, frozenset().union(*replaced))
    ranks.together(lambda: check_planned(filled, tensors))
    Roster.of(ranks, tensors).check_held(filled.megatron)
    shown.start("load", sum(local.data.nbytes for local in tensors))
    ranks.together(lambda: fill_all(filled, tensors, source, casting, shown))


def _with_memory(tensors: list[LocalTensor]) -> list[LocalTensor]:
    """The tensors. Raises InputError where there is no memory to fill."""
    for local in tensors:
        if local.data.is_meta:
            raise InputError(
                f"{local.key}: its parameter is on the meta device and holds no values; give the "
                f"chunks memory first, as by chunk.to_empty(device='cpu')"
            )
    return tensors


def planned_tensors(model: Sequence[torch.nn.Module], plan: ConversionPlan) -> list[LocalTensor]:
    """What this rank's chunks hold. Raises PlanError if the plan does not fill it."""
    tensors = local_tensors(model)
    check_planned(plan, tensors)
    return tensors


def whole_model(model: Sequence[torch.nn.Module], plan: ConversionPlan) -> LiveTensors:
    """The tensors of a model that this rank holds all of.

    Raises:
        PlanError: the model and the plan do not have the same tensors.
    """
    tensors = planned_tensors(model, plan)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        Roster.alone(tensors).check_held(plan.megatron)
    return LiveTensors(tensors)


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
    source = whole_model(model, plan)
    for name, spec in plan.hf.items():
        if name in plan.carried:
            continue
        yield name, as_torch(read_hf(plan, name, full_box(spec.shape), source, casting))
