"""The row of each parameter of a live model, in a list that is the same on every rank."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron.bridge.errors import PlanError
from megatron.bridge.live.local_tensors import named_parameters
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.wrapping import unwrapped

_EXPERT_NUMBER = re.compile(
    r"(?<=\.experts\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+"
    r"|(?<=\.experts\.linear_fc[12]\.bias)\d+"
)
_OUTPUT_LAYER = re.compile(r"(^|\.)output_layer\.weight$")
_NUMBER = re.compile(r"(\d+)")


class _Place(NamedTuple):
    """The first pipeline rank that has a parameter, and its chunk there."""

    pp_rank: int
    vp_stage: int


@dataclass(frozen=True)
class ConversionTask:
    """One parameter of the whole model and the row that converts it.

    Attributes:
        param_name: the parameter's name in its chunk on this rank; the global one where it is not
            on this rank.
        global_param_name: its name with the numbers that layer and expert have in the whole model.
        mapping: its row.
        pp_rank: the pipeline rank that has it.
        vp_stage: which of that rank's chunks has it.
        megatron_module: the module that owns it; None where it is not on this rank.
        param_weight: the parameter, or what is to be exported in its place; None where it is not on
            this rank.
    """

    param_name: str
    global_param_name: str
    mapping: ParamMapping
    pp_rank: int
    vp_stage: int
    megatron_module: torch.nn.Module | None
    param_weight: torch.Tensor | None


class _Owned(NamedTuple):
    """A parameter of this rank."""

    local_name: str
    place: _Place
    module: torch.nn.Module
    parameter: torch.nn.Parameter


def conversion_tasks(
    model: Sequence[torch.nn.Module], registry: MegatronMappingRegistry
) -> list[ConversionTask]:
    """The row of every parameter of the whole model, by name and number; a collective.

    Args:
        model: the chunks of this rank.
        registry: the rows.

    Raises:
        PlanError: a parameter has no row; on every rank alike.
    """
    own = dict(_owned(model))
    places = _of_all_ranks({name: one.place for name, one in own.items()})
    tasks, problems = [], []
    for name in sorted(places, key=_in_order):
        mapping, here = registry.megatron_to_hf_lookup(name), own.get(name)
        if mapping is None:
            problems.append(f"{name}: no row maps it")
            continue
        place = places[name] if here is None else here.place
        tasks.append(
            ConversionTask(
                name if here is None else here.local_name,
                name,
                mapping,
                place.pp_rank,
                place.vp_stage,
                None if here is None else here.module,
                None if here is None else here.parameter,
            )
        )
    if problems:
        raise PlanError(problems)
    return tasks


def _owned(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, _Owned]]:
    """Global name and parameter of each that this rank has, copies for tied layers left out."""
    pp_rank = parallel_state.get_pipeline_model_parallel_rank() if dist.is_initialized() else 0
    for vp_stage, chunk in enumerate(unwrapped(model)):
        is_tied = getattr(chunk, "share_embeddings_and_output_weights", False)
        local_names = (name for name, _ in chunk.named_parameters())
        for local, (name, module, parameter) in zip(
            local_names, named_parameters([chunk]), strict=True
        ):
            # Of tied weights the last pipeline stage has a copy under the name of its layer.
            if is_tied and _OUTPUT_LAYER.search(name):
                continue
            name = _with_global_expert(name, chunk)
            yield name, _Owned(local, _Place(pp_rank, vp_stage), module, parameter)


def _with_global_expert(name: str, chunk: torch.nn.Module) -> str:
    """The name with the number that a rank's own expert has in the whole layer."""
    found = _EXPERT_NUMBER.search(name)
    if found is None:
        return name
    ranks = parallel_state.get_expert_model_parallel_world_size()
    experts: int = chunk.config.num_moe_experts // ranks  # type: ignore[union-attr]
    number = int(found[0]) + experts * parallel_state.get_expert_model_parallel_rank()
    return f"{name[: found.start()]}{number}{name[found.end() :]}"


def _of_all_ranks(own: dict[str, _Place]) -> dict[str, _Place]:
    """What the ranks that hold one copy of the model have together: over stages, then experts."""
    known = own
    if not dist.is_initialized():
        return known
    for group in (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
    ):
        size = dist.get_world_size(group)
        if size > 1:
            told: list[dict[str, _Place]] = [{}] * size
            dist.all_gather_object(told, known, group)
            # What is on several stages, such as the embedding of predictors, is the first one's.
            known = {name: place for one in reversed(told) for name, place in one.items()}
    return known


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """A key to sort names by, their numbers as numbers."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in _NUMBER.split(name)
    ]
