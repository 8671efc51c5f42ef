"""Where each rank of a cluster stands, by megatron-core's own rule."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

from megatron.bridge.runtime.parallel_sizes import ParallelSizes


@dataclass(frozen=True, slots=True)
class RankPosition:
    """A rank's place in each group of ranks: `dp` of the dense part, `edp` of the experts."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int


def rank_positions(sizes: ParallelSizes) -> list[RankPosition]:
    """Every rank of a cluster that megatron-core accepts, in order."""
    world, etp = sizes.ranks, sizes.etp or sizes.tp
    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    dense = RankGenerator(
        tp=sizes.tp,
        ep=1,
        dp=world // sizes.dense_ranks,
        pp=sizes.pp,
        cp=sizes.cp,
        order=order,
    )
    experts = RankGenerator(
        tp=etp,
        ep=sizes.ep,
        dp=world // sizes.expert_ranks,
        pp=sizes.pp,
        cp=1,
        order=order,
    )
    axes = {
        "tp": _places(dense, "tp"),
        "cp": _places(dense, "cp"),
        "dp": _places(dense, "dp"),
        "pp": _places(dense, "pp"),
        "ep": _places(experts, "ep"),
        "etp": _places(experts, "tp"),
        "edp": _places(experts, "dp"),
    }
    return [
        RankPosition(rank, **{axis: places[rank] for axis, places in axes.items()})
        for rank in range(world)
    ]


def _places(generator: RankGenerator, axis: str) -> dict[int, int]:
    """Rank -> its place in its group along an axis."""
    return {rank: place for group in generator.get_ranks(axis) for place, rank in enumerate(group)}
