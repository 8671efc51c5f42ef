"""One rank's shard of a whole parameter and back, for `hf_to_megatron` and `megatron_to_hf`.

Which axis is split is read off the parameter, where megatron-core's layers mark it; parts that
are split on their own (gate and up) are what the row says.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.param_mapping import split_axis
from megatron.bridge.models.conversion.structure import RankSection

type Sections = Callable[[int], Sequence[RankSection]]
"""The sections of a whole parameter with so many rows."""


def local_shard(
    whole: torch.Tensor,
    parameter: torch.nn.Parameter,
    module: torch.nn.Module,
    sections: Sections,
) -> torch.Tensor:
    """This rank's part of `whole`, of the parameter's shape. Raises InputError on a misfit."""
    axis = split_axis(parameter)
    if axis is not None:
        group = _group(module)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = [section.rows for section in sections(len(whole))] if axis == 0 else None
        parts = whole.split(rows or whole.shape[axis], dim=axis)
        whole = torch.cat([part.chunk(size, dim=axis)[rank] for part in parts], dim=axis)
    if whole.shape != parameter.shape:
        raise InputError(
            f"{type(module).__name__}: the parameter has shape {tuple(parameter.shape)}, "
            f"the tensors make {tuple(whole.shape)}"
        )
    return whole.contiguous()


def gather_shards(
    shard: torch.Tensor,
    parameter: torch.nn.Parameter,
    module: torch.nn.Module,
    sections: Sections,
) -> torch.Tensor:
    """The whole parameter, from the shards of all ranks of the group (a collective)."""
    axis = split_axis(parameter)
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
    rows = [section.rows // size for section in sections(len(shard) * size)]
    by_section = zip(*(part.split(rows) for part in shards), strict=True)
    return torch.cat([part for parts in by_section for part in parts])


def _group(module: torch.nn.Module) -> dist.ProcessGroup:
    """The module's tensor-parallel group; megatron-core's layers keep it as `tp_group`."""
    group = getattr(module, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return group
