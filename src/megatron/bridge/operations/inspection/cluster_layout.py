"""A model laid out over a cluster: what every rank holds, without a cluster.

The real model is built on the meta device, as a rank of torch's fake process group. megatron-core
splits tensors into equal parts only, so ranks of one pipeline stage hold tensors of the same
shapes. Stages in the middle of a pipeline have decoder layers and nothing else, and two of them
whose layers are of the same kinds, chunk by chunk, hold the same but for the numbers of their
layers. So one rank of each kind of stage is built, and of it one layer of each kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.pipeline_stages import pipeline_stages, stage_index
from megatron.bridge.models.without_values import build_without_values
from megatron.bridge.operations.inspection.rank_grid import RankPosition, rank_positions
from megatron.bridge.operations.inspection.rank_share import RankShare, layer_of, share_of
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.runtime.parallel import fake_cluster
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.runtime.repeated_layers import repeated_layers

type Layers = tuple[tuple[int, ...], ...]
"""Numbers of the layers in the whole model, of each chunk of a stage."""

_PATTERNS = ("linear_attention_freq", "moe_layer_freq")

_ADVICE = (
    "Using a large number of experts .* without fp32 routing",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
)


@dataclass(frozen=True)
class Blueprint:
    """A model that has no parallel layout yet.

    Attributes:
        bridge: of its family.
        make: makes its provider, a new one every time.
    """

    bridge: MegatronModelBridge
    make: Callable[[], ModelProvider]


@dataclass(frozen=True)
class ParallelLayout:
    """What every rank of a cluster holds.

    Attributes:
        sizes: of the cluster.
        stages: the share of every rank of a pipeline stage, by the index of the stage.
        positions: of every rank; its `pp` is the index of its stage.
    """

    sizes: ParallelSizes
    stages: tuple[RankShare, ...]
    positions: tuple[RankPosition, ...]

    def ranks_of(self, stage: int) -> list[int]:
        """The ranks of a pipeline stage."""
        return [position.rank for position in self.positions if position.pp == stage]


def configured(model: Blueprint, sizes: ParallelSizes) -> ModelProvider:
    """A provider with these sizes, set as training scripts of Megatron-LM set them."""
    provider = model.make()
    for field, size in sizes.fields.items():
        setattr(provider, field, size)
    if sizes.vpp is not None:
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    if provider.num_moe_experts:
        provider.sequence_parallel = sizes.tp > 1
    provider.perform_initialization = False  # there are no values
    # TransformerEngine would make them on the GPU, under the same keys.
    provider.transformer_impl = "local"
    return provider


@contextmanager
def on_rank(rank: int, sizes: ParallelSizes) -> Iterator[None]:
    """Be a rank of the cluster, on the meta device."""
    with fake_cluster(rank, sizes.ranks, sizes), torch.device("meta"):
        yield


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence what megatron-core advises for training with such sizes: nobody trains here."""
    with warnings.catch_warnings():
        for message in _ADVICE:
            warnings.filterwarnings("ignore", message=message)
        yield


def build_rank(model: Blueprint, sizes: ParallelSizes, rank: int) -> RankShare:
    """Build the model of one rank and measure it."""
    provider = configured(model, sizes)
    with on_rank(rank, sizes), repeated_layers():
        stages = [None] if sizes.vpp is None else list(range(sizes.vpp))
        chunks = build_without_values(
            provider, lambda: [provider.provide(vp_stage=stage) for stage in stages]
        )
        return share_of(chunks, model.bridge)


def lay_out(
    model: Blueprint, sizes: ParallelSizes, progress: Progress | None = None
) -> ParallelLayout:
    """What every rank holds.

    Args:
        model: the one to lay out.
        sizes: of the cluster.
        progress: told of the stages; a cluster of a hundred thousand ranks takes minutes.

    Raises:
        Exception: whatever megatron-core raises for sizes that it refuses.
    """
    shown = progress or Silent()
    with without_advice():
        provider = configured(model, sizes)
        provider.finalize()  # most refusals need no cluster, which takes its time
        shown.start("plan", sizes.pp)
        with on_rank(0, sizes):  # only of a cluster that it accepts are the positions right
            positions = rank_positions(sizes)
        first = {position.pp: position.rank for position in reversed(positions)}
        stages: list[RankShare] = []
        kinds: dict[object, RankShare] = {}
        for stage in range(sizes.pp):
            kind = _kind_of_stage(provider, sizes, stage)
            if kind in kinds:
                layers = _layers_of_stage(provider, sizes, stage)
                share = _shifted(kinds[kind], layers, model.bridge.layer_paths[0])
            else:
                share = kinds[kind] = build_rank(model, sizes, first[stage])
            stages.append(share)
            shown.advance(1)
    return ParallelLayout(sizes, tuple(stages), tuple(positions))


def _layers_of_stage(provider: ModelProvider, sizes: ParallelSizes, stage: int) -> Layers:
    """The layers of a stage, as megatron-core deals them out.

    Args:
        provider: a finalized one.
        sizes: of the cluster.
        stage: its index.
    """
    dealt = pipeline_stages(provider)
    chunks = range(sizes.vpp or 1)
    return tuple(tuple(dealt[stage_index(provider, one, stage)].layers) for one in chunks)


def _kind_of_stage(provider: ModelProvider, sizes: ParallelSizes, stage: int) -> object:
    """Equal for stages that hold the same; the first and the last are like no other."""
    if stage in (0, sizes.pp - 1):
        return stage
    layers = _layers_of_stage(provider, sizes, stage)
    return tuple(tuple(_kind_of_layer(provider, layer) for layer in chunk) for chunk in layers)


def _shifted(share: RankShare, layers: Layers, decoder: str) -> RankShare:
    """What a stage holds that has these layers in place of those of `share`.

    Args:
        share: of a stage of the same kind.
        layers: the numbers of the layers.
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


def _kind_of_layer(provider: ModelProvider, layer: int) -> tuple[int, ...]:
    kinds = []
    for name in _PATTERNS:
        pattern = getattr(provider, name)
        if isinstance(pattern, list):
            kinds.append(pattern[layer])
        else:  # every so many layers, or all alike
            kinds.append(layer % pattern if pattern else 0)
    return tuple(kinds)
