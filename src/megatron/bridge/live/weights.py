"""Weights of live Megatron models: their plan, and filling them from Hugging Face tensors."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.formats.file_plans import plan_of
from megatron.bridge.live.filling import fill_all
from megatron.bridge.live.local_tensors import (
    LocalTensor,
    check_planned,
    local_tensors,
    with_memory,
)
from megatron.bridge.live.mismatched import replaced_keys, without_keys
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.layer_keys import KeyForms
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.structure import LanguageFields
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.wrapping import unwrapped
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.runtime.parallel import ranks_of_model
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.source import Source


def options_of_model(hf: PreTrainedVLM, model: Sequence[torch.nn.Module]) -> PlanOptions:
    """What a live model was built with: rows of the embedding, its parts, forms of keys."""
    if not model:
        raise InputError("model is an empty list; give the chunks that the provider built")
    return _options(hf, unwrapped(model)[0].config, _keys(model))


def plan_of_ranks(
    hf: PreTrainedVLM,
    model: Sequence[torch.nn.Module],
    ranks: Ranks,
    *,
    experts: str | None = None,
    dtype: DType | None = None,
) -> ConversionPlan:
    """`plan_of_model` of a model that not every rank has a part of; the same on all of them.

    Raises:
        InputError: no rank has a part of it, or another rank cannot go on.
    """

    def own() -> tuple[PlanOptions, set[str]] | None:
        if not model:
            return None
        keys = _keys(model)
        return _options(hf, unwrapped(model)[0].config, keys), keys

    told = [one for one in ranks.all_of(own) if one is not None]

    def planned() -> ConversionPlan:
        if not told:
            raise InputError("no rank has a part of the model; give its chunks where they are")
        keys = set().union(*(keys for _, keys in told))
        paths = bridge_for(hf.hf_config.architecture).layer_paths
        options = replace(told[0][0], keys=KeyForms.of(keys, paths))
        return _planned(hf, options, experts, dtype)

    return ranks.together(planned)


def _keys(model: Sequence[torch.nn.Module]) -> set[str]:
    return {local.key for local in local_tensors(model)}


def _options(hf: PreTrainedVLM, config: ModelProvider, keys: set[str]) -> PlanOptions:
    bridge = bridge_for(hf.hf_config.architecture)
    forms = KeyForms.of(keys, bridge.layer_paths)
    options = replace(bridge.options_of_model(config), keys=forms)
    for fields in bridge.structure(hf.hf_config, options=options).fields.values():
        # More tokens look like padding, and then no file has them, though they are predicted.
        if isinstance(fields, LanguageFields) and fields.vocab_size != config.vocab_size:
            raise ConfigError(
                f"the model has vocab_size = {config.vocab_size}, and {hf.hf_config.origin} "
                f"{fields.vocab_size}: set the provider's vocab_size to {fields.vocab_size} "
                f"(make_vocab_size_divisible_by pads)"
            )
    return options


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
    return _planned(hf, options_of_model(hf, model), experts, dtype)


def _planned(
    hf: PreTrainedVLM, options: PlanOptions, experts: str | None, dtype: DType | None
) -> ConversionPlan:
    plan = plan_of(hf, replace(options, experts=experts))
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

    load_weights(model, ranks_of_model().together(planned), hf.weights, progress, casting, allowed)


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
    ranks, shown = ranks_of_model(), progress or Silent()

    tensors = ranks.together(lambda: with_memory(local_tensors(model)))
    replaced = ranks.all_of(lambda: replaced_keys(plan, model, tensors, allowed))
    filled, tensors = without_keys(plan, tensors, frozenset().union(*replaced))
    ranks.together(lambda: check_planned(filled, tensors))
    Roster.of(ranks, tensors).check_held(filled.megatron)
    shown.start("load", sum(local.data.nbytes for local in tensors))
    ranks.together(lambda: fill_all(filled, tensors, source, casting, shown))


def planned_tensors(model: Sequence[torch.nn.Module], plan: ConversionPlan) -> list[LocalTensor]:
    """What this rank's chunks hold. Raises PlanError if the plan does not fill it."""
    tensors = local_tensors(model)
    check_planned(plan, tensors)
    return tensors
