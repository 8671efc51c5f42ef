"""Pipeline stages that hold the same, but for the numbers of their layers.

Those in the middle of a pipeline have decoder layers and nothing else. megatron-core says how many
and which; two of them whose layers are of the same kinds, chunk by chunk, hold tensors of the same
shapes, so one of them is built.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.operations.inspection.cluster_request import ParallelRequest
from megatron.bridge.operations.inspection.rank_share import RankShare, layer_of

type Layers = tuple[tuple[int, ...], ...]
"""Numbers of the layers in the whole model, of each chunk of a stage."""

_PATTERNS = ("linear_attention_freq", "moe_layer_freq")


def stage_layers(provider: ModelProvider, request: ParallelRequest, stage: int) -> Layers:
    """The layers of a stage, as megatron-core deals them out. provider: finalized."""
    chunks = [None] if request.vpp is None else range(request.vpp)
    found = []
    for chunk in chunks:
        first = get_transformer_layer_offset(provider, chunk, stage)
        found.append(tuple(range(first, first + get_num_layers_to_build(provider, chunk, stage))))
    return tuple(found)


def kind_of_stage(provider: ModelProvider, request: ParallelRequest, stage: int) -> object:
    """Equal for stages that hold the same; the first and the last are like no other."""
    if stage in (0, request.pp - 1):
        return stage
    layers = stage_layers(provider, request, stage)
    return tuple(tuple(_kind(provider, layer) for layer in chunk) for chunk in layers)


def shifted(share: RankShare, layers: Layers, decoder: str) -> RankShare:
    """What a stage holds that has these layers in place of those of `share`.

    decoder: what names of parameters have before the number of a layer.
    """
    numbers = {
        old: new
        for before, after in zip(share.layers, layers, strict=True)
        for old, new in zip(before, after, strict=True)
    }
    name = share.largest.name
    if (place := layer_of(name, decoder)) is not None:
        number, begin, end = place
        name = f"{name[:begin]}{numbers[number]}{name[end:]}"
    return replace(share, layers=layers, largest=replace(share.largest, name=name))


def _kind(provider: ModelProvider, layer: int) -> tuple[int, ...]:
    kinds = []
    for name in _PATTERNS:
        pattern = getattr(provider, name)
        if isinstance(pattern, list):
            kinds.append(pattern[layer])
        else:  # every so many layers, or all alike
            kinds.append(layer % pattern if pattern else 0)
    return tuple(kinds)
