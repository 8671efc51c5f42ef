"""Rows applied to live modules: whole Hugging Face tensors, and the shard that a rank holds.

Which axis tensor parallelism splits is read off the parameter, where megatron-core's layers mark
it; parts that are split on their own (gate and up) are what the row says.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.layout import HF, Layout, LayoutError
from megatron.bridge.models.conversion.structure import LayoutFields
from megatron.bridge.models.conversion.transfer import to_hf, to_megatron
from megatron.bridge.tensors.arrays import copy
from megatron.bridge.tensors.boxes import slices
from megatron.bridge.tensors.torch_views import as_array, as_torch

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.param_mapping import ParamMapping


_AXES = {"column": 0, "row": 1, "replicated": None}

_REGISTERED: dict[str, int | None] = {}
"""The axis that modules of a class split, by the name of the class; None for none."""


def register_module_type(module_name: str, parallelism: str) -> None:
    """See `AutoMapping.register_module_type`."""
    if parallelism not in _AXES:
        raise InputError(
            f"register_module_type: {parallelism!r} is no way to split the weight of "
            f"{module_name}; expected one of {', '.join(_AXES)}"
        )
    _REGISTERED[module_name] = _AXES[parallelism]


def hf_to_megatron(
    row: "ParamMapping",
    hf_weights: torch.Tensor | Mapping[str, torch.Tensor],
    module: torch.nn.Module,
) -> torch.Tensor:
    """This rank's shard of a row's parameter; see `ParamMapping.hf_to_megatron`."""
    tensors = dict(hf_weights) if isinstance(hf_weights, Mapping) else {HF: hf_weights}
    with _naming(row):
        whole = assemble(row.layout(_fields(module)), tensors)
    return shard_of(row, whole, module)


def megatron_to_hf(
    row: "ParamMapping", shard: torch.Tensor, module: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Whole Hugging Face tensors by name; see `ParamMapping.megatron_to_hf`."""
    whole = whole_of(row, shard, module)
    with _naming(row):
        tensors = disassemble(row.layout(_fields(module)), whole)
    return {row.hf_params[role]: tensor for role, tensor in tensors.items()}


def shard_of(row: "ParamMapping", whole: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """This rank's part of a whole parameter. Raises InputError if the shapes do not fit."""
    parameter = _parameter(row, module)
    axis = split_axis(parameter, module)
    if axis is not None:
        group = _group(module)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = _section_rows(row, module, len(whole)) if axis == 0 else whole.shape[axis]
        parts = whole.split(rows, dim=axis)
        whole = torch.cat([part.chunk(size, dim=axis)[rank] for part in parts], dim=axis)
    if whole.shape != parameter.shape:
        raise InputError(
            f"{type(module).__name__}: the parameter has shape {tuple(parameter.shape)}, "
            f"the tensors make {tuple(whole.shape)}"
        )
    return whole.contiguous()


def whole_of(row: "ParamMapping", shard: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """The whole parameter, from the shards of all ranks of the group (a collective)."""
    axis = split_axis(_parameter(row, module), module)
    if axis is None:
        return shard
    group = _group(module)
    size = dist.get_world_size(group)
    if size == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard.contiguous(), group=group)
    if axis != 0:
        return torch.cat(shards, dim=axis)
    rows = [number // size for number in _section_rows(row, module, len(shard) * size)]
    by_section = zip(*(part.split(rows) for part in shards), strict=True)
    return torch.cat([part for parts in by_section for part in parts])


def split_axis(parameter: torch.nn.Parameter, module: torch.nn.Module) -> int | None:
    """The axis that tensor parallelism splits, as megatron-core marks it on the parameter.

    What is registered for the class of the module counts more.
    """
    if type(module).__name__ in _REGISTERED:
        return _REGISTERED[type(module).__name__]
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def tensor_parallel_size(row: "ParamMapping") -> int:
    """See `ParamMapping.tp_size`."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 1
    if row.is_expert:
        return int(parallel_state.get_expert_tensor_parallel_world_size())
    return int(parallel_state.get_tensor_model_parallel_world_size())


def expert_parallel_size() -> int:
    """See `ParamMapping.ep_size`."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 1
    return int(parallel_state.get_expert_model_parallel_world_size())


def assemble(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A whole Megatron parameter from whole Hugging Face tensors by role.

    Raises:
        LayoutError: the shapes do not fit.
    """
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    shape = layout.megatron_shape(shapes)
    first, *others = tensors.values()
    dtype = first.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    result = torch.zeros(shape, dtype=dtype, device="cpu")
    out = as_array(result)
    arrays = {role: as_array(tensor.cpu()) for role, tensor in tensors.items()}
    for piece in layout.pieces(shapes):
        part, target = arrays[piece.role][slices(piece.hf_box)], out[slices(piece.megatron_box)]
        copy(to_megatron(part, piece, target.shape, out.dtype), target)
    return result.to(first.device)


def disassemble(layout: Layout, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whole Hugging Face tensors by role from a whole Megatron parameter.

    Raises:
        LayoutError: the shape does not fit.
    """
    shapes = layout.hf_shapes(tuple(tensor.shape))
    given = as_array(tensor.cpu())
    result = {role: np.empty(shape, given.dtype) for role, shape in shapes.items()}
    for piece in layout.pieces(shapes):
        target = result[piece.role][slices(piece.hf_box)]
        copy(to_hf(given[slices(piece.megatron_box)], piece, target.shape, given.dtype), target)
    return {role: as_torch(array).to(tensor.device) for role, array in result.items()}


class _NoFields:
    """In the place of a config: plain torch modules have none, and most rows need none."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = type(module).__name__

    def __getattr__(self, name: str) -> NoReturn:
        raise InputError(
            f"{self._module} has no config to read {name} from; set its attribute `config` to that "
            f"of the model"
        )


def _fields(module: torch.nn.Module) -> LayoutFields:
    """The config of the module."""
    return cast(LayoutFields, getattr(module, "config", None) or _NoFields(module))


def _section_rows(row: "ParamMapping", module: torch.nn.Module, rows: int) -> list[int]:
    return [section.rows for section in row.rank_sections(_fields(module), rows)]


def _parameter(row: "ParamMapping", module: torch.nn.Module) -> torch.nn.Parameter:
    """The module's own parameter of a row, which must be split as the row declares."""
    name = row.megatron_param.rpartition(".")[2]
    own = dict(module.named_parameters(recurse=False))
    # Layer specs without fused norms keep layer_norm_weight in a module of its own, those
    # without grouped experts weight7.
    names = (name, name.rpartition("_")[2], name.rstrip("0123456789"))
    found = next((own[name] for name in names if name in own), None)
    if found is None:
        raise InputError(f"{row.megatron_param}: {type(module).__name__} has no such parameter")
    axis = split_axis(found, module)
    if axis is not None and (row.replicated or row.expected_axis not in (None, axis)):
        raise InputError(
            f"{row.megatron_param}: declared as {type(row).__name__}, but the module splits "
            f"axis {axis}; declare it as AutoMapping or mend the layer spec"
        )
    return found


def _group(module: torch.nn.Module) -> dist.ProcessGroup:
    """The module's tensor-parallel group; megatron-core's layers keep it as `tp_group`."""
    group = getattr(module, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return group


@contextmanager
def _naming(row: "ParamMapping") -> Iterator[None]:
    """Name the row of a LayoutError."""
    try:
        yield
    except LayoutError as error:
        names = ", ".join(row.hf_params.values())
        raise InputError(f"{row.megatron_param} from {names}: {error}") from error
