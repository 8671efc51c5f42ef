"""A model laid out over a cluster: what every rank holds, without a cluster.

The real model is built on the meta device, as a rank of torch's fake process group. megatron-core
splits tensors into equal parts only, so ranks of one pipeline stage hold tensors of the same
shapes: one rank of each kind of stage is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.operations.inspection.alike_stages import kind_of_stage, shifted, stage_layers
from megatron.bridge.operations.inspection.cluster_request import OPTIONS, ParallelRequest
from megatron.bridge.operations.inspection.rank_grid import RankPosition, rank_positions
from megatron.bridge.operations.inspection.rank_share import RankShare, share_of
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.runtime.parallel import ParallelSizes, fake_cluster

_ADVICE = (
    "Using a large number of experts .* without fp32 routing",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
)


@dataclass(frozen=True)
class PlannedModel:
    """A model that has no parallel layout yet. make: makes its provider, a new one every time."""

    bridge: MegatronModelBridge
    make: Callable[[], ModelProvider]


@dataclass(frozen=True)
class ParallelLayout:
    """What every rank of a cluster holds.

    stages: the share of every rank of a pipeline stage. positions: of every rank; its `pp` is the
    index of its stage.
    """

    request: ParallelRequest
    stages: tuple[RankShare, ...]
    positions: tuple[RankPosition, ...]

    def ranks_of(self, stage: int) -> list[int]:
        """The ranks of a pipeline stage."""
        return [position.rank for position in self.positions if position.pp == stage]


def configured(model: PlannedModel, request: ParallelRequest) -> ModelProvider:
    """A provider with the sizes of `request`, set as training scripts of Megatron-LM set them."""
    provider = model.make()
    for option, field in OPTIONS.items():
        setattr(provider, field, getattr(request, option))
    if request.vpp is not None:
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    if provider.num_moe_experts:
        provider.sequence_parallel = request.tp > 1
    provider.perform_initialization = False  # there are no values
    # TransformerEngine would make them on the GPU, under the same keys.
    provider.transformer_impl = "local"
    return provider


@contextmanager
def on_rank(rank: int, request: ParallelRequest) -> Iterator[None]:
    """Be a rank of the cluster, on the meta device."""
    sizes = ParallelSizes(**{field: getattr(request, name) for name, field in OPTIONS.items()})
    with fake_cluster(rank, request.ranks, sizes), torch.device("meta"):
        yield


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence what megatron-core advises for training with such sizes: nobody trains here."""
    with warnings.catch_warnings():
        for message in _ADVICE:
            warnings.filterwarnings("ignore", message=message)
        yield


def build_rank(model: PlannedModel, request: ParallelRequest, rank: int) -> RankShare:
    """Build the model of one rank and measure it."""
    provider = configured(model, request)
    with on_rank(rank, request):
        stages = [None] if request.vpp is None else list(range(request.vpp))
        chunks = [provider.provide(vp_stage=stage) for stage in stages]
        return share_of(chunks, model.bridge)


def lay_out(
    model: PlannedModel, request: ParallelRequest, progress: Progress | None = None
) -> ParallelLayout:
    """What every rank holds. Raises whatever megatron-core raises for sizes that it refuses.

    progress: of the stages; a cluster of a hundred thousand ranks takes minutes.
    """
    shown = progress or Silent()
    with without_advice():
        provider = configured(model, request)
        provider.finalize()  # most refusals need no cluster, which takes its time
        shown.start("plan", request.pp)
        with on_rank(0, request):  # only of a cluster that it accepts are the positions right
            positions = rank_positions(request)
        first = {position.pp: position.rank for position in reversed(positions)}
        stages: list[RankShare] = []
        kinds: dict[object, RankShare] = {}
        for stage in range(request.pp):
            kind = kind_of_stage(provider, request, stage)
            if kind in kinds:
                layers = stage_layers(provider, request, stage)
                share = shifted(kinds[kind], layers, model.bridge.layer_paths[0])
            else:
                share = kinds[kind] = build_rank(model, request, first[stage])
            stages.append(share)
            shown.advance(1)
    return ParallelLayout(request, tuple(stages), tuple(positions))
