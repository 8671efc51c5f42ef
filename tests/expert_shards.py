"""What the ranks of a small model of experts hold, without any process."""

from __future__ import annotations

from functools import cache

import plans_of
import released_configs as released
from megatron.bridge.exchange.roster import Shard
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import full_box, part_of

RANKS = 6


@cache
def plan_with(experts: int) -> ConversionPlan:
    counts = {"num_experts": experts, "num_local_experts": experts, "num_hidden_layers": 2}
    config = plans_of.small(
        released.QWEN3_5_35B_A3B, **counts, layer_types=["linear_attention", "full_attention"]
    )
    return plans_of.plan(config, plans_of.tensors_of(config))


def shards_of(
    plan: ConversionPlan, owners: list[list[int]], rows_of: list[list[int]]
) -> tuple[tuple[Shard, ...], ...]:
    """What each rank holds: of experts one box each, of all else rows.

    Args:
        plan: of the model.
        owners: the ranks that hold each expert.
        rows_of: those that hold each part of all other tensors.
    """
    found: list[list[Shard]] = [[] for _ in range(RANKS)]
    for key, spec in plan.megatron.items():
        of_experts = ".experts.experts." in key
        holders = owners if of_experts else rows_of
        for number, ranks in enumerate(holders):
            box = part_of(full_box(spec.shape), number, len(holders))
            for rank in ranks if box is not None else ():
                found[rank].append(Shard(key, spec.shape, box, spec.dtype, False))
    return tuple(map(tuple, found))
