"""One rank's shard of a whole parameter and back, for `hf_to_megatron` and `megatron_to_hf`.

Which axis is split is read off the parameter, where megatron-core's layers mark it; parts that
are split separately (gate and up) are read off the layout.
"""

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.layout import Concatenate, Layout
from megatron.bridge.models.conversion.param_mapping import split_axis


def local_shard(
    whole: torch.Tensor,
    parameter: torch.nn.Parameter,
    module: torch.nn.Module,
    layout: Layout,
) -> torch.Tensor:
    """This rank's part of `whole`, of the parameter's shape. Raises InputError on a misfit."""
    axis = split_axis(parameter)
    if axis is not None:
        group = _group(module)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        parts = [section.chunk(size, dim=axis)[rank] for section in _sections(whole, axis, layout)]
        whole = torch.cat(parts, dim=axis)
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
    layout: Layout,
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
    by_rank = [_sections(part, axis, layout) for part in shards]
    return torch.cat([section for parts in zip(*by_rank, strict=True) for section in parts], axis)


def _sections(tensor: torch.Tensor, axis: int, layout: Layout) -> tuple[torch.Tensor, ...]:
    """The parts along the split axis that ranks share out one by one."""
    if isinstance(layout, Concatenate) and layout.axis == axis:
        return tensor.chunk(len(layout.names), dim=axis)
    return (tensor,)


def _group(module: torch.nn.Module) -> dist.ProcessGroup:
    """The module's tensor-parallel group; megatron-core's layers keep it as `tp_group`."""
    group = getattr(module, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return group
