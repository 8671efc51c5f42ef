"""The row of each parameter of a live model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.bridge.errors import PlanError
from megatron.bridge.live.local_tensors import named_parameters
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import ParamMapping


@dataclass(frozen=True)
class ConversionTask:
    """One parameter of a live model and the row that converts it.

    Attributes:
        name: the parameter's name with the layer's number in the whole model.
        mapping: its row.
        megatron_module: the module that owns it.
        param_weight: the parameter.
    """

    name: str
    mapping: ParamMapping
    megatron_module: torch.nn.Module
    param_weight: torch.Tensor


def conversion_tasks(
    model: Sequence[torch.nn.Module], registry: MegatronMappingRegistry
) -> list[ConversionTask]:
    """The row of every parameter of this rank. Raises PlanError for one without a row."""
    tasks, problems = [], []
    for name, module, parameter in named_parameters(model):
        mapping = registry.megatron_to_hf_lookup(name)
        if mapping is None:
            problems.append(f"{name}: no row maps it")
        else:
            tasks.append(ConversionTask(name, mapping, module, parameter))
    if problems:
        raise PlanError(problems)
    return tasks
