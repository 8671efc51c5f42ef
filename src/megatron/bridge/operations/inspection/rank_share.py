"""What one rank of a training run holds, as megatron-core itself declares it.

Nothing about sharding is written here. The model's own parameters say what a rank holds of the
weights; `DistributedOptimizer.compute_full_param_layout` says how long the buffers of gradients
are and into how many shards they are cut for the optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.live.local_tensors import named_parameters
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

_MOMENTS = 2


@dataclass(frozen=True, slots=True)
class LargestTensor:
    """The largest parameter of a rank: its name in the whole model, its local shape."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank holds.

    Attributes:
        layers: numbers of the decoder layers in the whole model, of each chunk.
        parts: those of the model that the rank has beside the layers.
        parameters: how many numbers the rank holds, those that other ranks hold too included.
        weight_bytes: of the parameters in their own dtypes.
        gradient_bytes: of the float32 buffers that gradients are summed up in.
        optimizer_bytes: of this rank's shard of Adam's state, see `adam_bytes`.
        largest: the largest of the parameters.
    """

    layers: tuple[tuple[int, ...], ...]
    parts: tuple[str, ...]
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    largest: LargestTensor

    @property
    def bytes(self) -> int:
        """Weights, gradients and optimizer together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def share_of(chunks: Sequence[torch.nn.Module], bridge: MegatronModelBridge) -> RankShare:
    """The share of the rank whose process groups exist and that built `chunks`."""
    decoder = bridge.layer_paths[0]
    buffers = [_buffer_bytes(chunk.parameters()) for chunk in chunks]
    layers, parts = [], set()
    parameters = weight_bytes = 0
    largest = LargestTensor("", (), -1)
    for chunk in chunks:
        own_layers = set()
        for name, _, parameter in named_parameters([chunk]):
            if (place := layer_of(name, decoder)) is not None:
                own_layers.add(place[0])
            parts |= {part for prefix, part in bridge.parts.items() if name.startswith(prefix)}
            parameters += parameter.numel()
            weight_bytes += parameter.nbytes
            if parameter.nbytes > largest.bytes:
                largest = LargestTensor(name, tuple(parameter.shape), parameter.nbytes)
        layers.append(tuple(sorted(own_layers)))
    return RankShare(
        layers=tuple(layers),
        parts=tuple(part for part in bridge.parts.values() if part in parts),
        parameters=parameters,
        weight_bytes=weight_bytes,
        gradient_bytes=sum(gradients for gradients, _ in buffers),
        optimizer_bytes=sum(optimizer for _, optimizer in buffers),
        largest=largest,
    )


def layer_of(name: str, decoder: str) -> tuple[int, int, int] | None:
    """The number of the decoder layer that a parameter belongs to, and where it stands in its name.

    Args:
        name: of the parameter.
        decoder: what stands before that number.

    Returns:
        The number, and the places where it begins and ends in the name; None for a parameter of no
        decoder layer.
    """
    match = re.match(rf"{re.escape(decoder)}(\d+)\.", name)
    return None if match is None else (int(match[1]), *match.span(1))


def adam_bytes(dtype: torch.dtype) -> int:
    """Bytes of Adam's state for one parameter: two moments, and a copy where it is narrower.

    All in float32, as megatron-core's OptimizerConfig has them by default.
    """
    copies = 0 if dtype == torch.float32 else 1
    return (_MOMENTS + copies) * torch.float32.itemsize


def _buffer_bytes(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Bytes of gradients and of this rank's optimizer shard, the padding of buffers included."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in parameters if parameter.requires_grad],
        config.bucket_size,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        config,
        parallel_state.get_expert_data_parallel_world_size(),
    )
    gradients = optimizer = 0
    for key, buffer in layout.layouts.items():
        length = buffer.bucket_indices[-1][1]
        gradients += length * key.grad_dtype.itemsize
        optimizer += length // buffer.num_optimizer_shards * adam_bytes(key.param_dtype)
    return gradients, optimizer
