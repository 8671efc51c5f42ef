"""Routes of joined boxes: what they move is what the single boxes of the plan would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_shards import RANKS, plan_with, shards_of
from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.exchange.buffer_views import PackedWindow, Packing
from megatron.bridge.exchange.demand import Demand, Wanted
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.exchange.route import Affinity, Moves, Routes
from megatron.bridge.exchange.windows import schedule
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.casting import EXACTLY
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, box_shape, full_box, intersect, part_of, slices

some_ranks = st.lists(st.integers(0, RANKS - 1), min_size=1, max_size=3, unique=True)


@given(
    owners=st.lists(some_ranks, min_size=5, max_size=5),
    rows_of=st.lists(some_ranks, min_size=1, max_size=3),
    per_node=st.sampled_from([None, 2, 4]),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_every_element_comes_from_the_rank_that_single_boxes_would_take(
    owners: list[list[int]], rows_of: list[list[int]], per_node: int | None, data: st.DataObject
) -> None:
    plan, affinity = plan_with(5), Affinity(per_node)
    held = shards_of(plan, owners, rows_of)
    names = [name for name in plan.hf if name not in plan.carried]
    count = data.draw(st.integers(1, 4))
    wanted = [
        tuple(
            Demand(name, box)
            for name in names[rank % 2 :: 2]
            if (box := part_of(full_box(plan.hf[name].shape), rank % count, count)) is not None
        )
        for rank in range(RANKS)
    ]
    routes = Routes(plan, Roster(held, ()), Wanted(tuple(wanted)), affinity)
    routes.check()
    moves = [routes.of(rank) for rank in range(RANKS)]
    for rank, demands in enumerate(wanted):
        expected = senders_of(plan, held, demands, affinity, rank)
        assert same(expected, received(plan, moves[rank], demands))
        assert same(expected, sent_to(plan, moves, demands, rank))


def senders_of(
    plan: ConversionPlan, held: Any, demands: tuple[Demand, ...], affinity: Affinity, rank: int
) -> dict[str, Any]:
    """By each copy of the plan and each shard: the sender of every element."""
    found = {one.name: np.full(plan.hf[one.name].shape, -1) for one in demands}
    numbers = {name: number for number, name in enumerate(plan.hf)}
    holders: dict[tuple[str, Box], list[int]] = {}
    for holder, own in enumerate(held):
        for shard in own:
            holders.setdefault((shard.key, shard.box), []).append(holder)
    boxes = {one.name: one.box for one in demands}
    for (key, box), ranks in holders.items():
        for shared, copy in plan.copies_to(key, box):
            if copy.hf_name in boxes:
                part = intersect(hf_part(copy, shared), boxes[copy.hf_name])
                if part is not None:
                    sender = affinity.sender(tuple(ranks), rank, numbers[copy.hf_name])
                    found[copy.hf_name][slices(part)] = sender
    return found


def received(plan: ConversionPlan, moves: Moves, demands: tuple[Demand, ...]) -> dict[str, Any]:
    found = {one.name: np.full(plan.hf[one.name].shape, -1) for one in demands}
    for side in (moves.received, moves.own):
        for name, own in side.items():
            for move in own:
                assert (found[name][slices(move.box)] == -1).all()
                (found[name][slices(move.box)],) = move.peers
    return found


def sent_to(
    plan: ConversionPlan, moves: list[Moves], demands: tuple[Demand, ...], rank: int
) -> dict[str, Any]:
    found = {one.name: np.full(plan.hf[one.name].shape, -1) for one in demands}
    for sender, sides in enumerate(moves):
        for side in (sides.sent, sides.own):
            for name, own in side.items():
                for move in own:
                    if rank in move.peers:
                        assert (found[name][slices(move.box)] == -1).all()
                        found[name][slices(move.box)] = sender
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("experts", [12, 60])
def test_what_a_rank_keeps_does_not_grow_with_the_experts(experts: int) -> None:
    """Ranks hold experts that follow one another; what is kept of them is a view of all."""
    few, many = kept(6), kept(experts)
    assert many.moves == few.moves
    assert many.received == few.received
    # What is sent lies in memories of their own.
    assert many.sent - few.sent <= 2 * 3 * RANKS * (experts - 6) // RANKS


class Kept:
    def __init__(self, moves: Moves, window: PackedWindow) -> None:
        self.moves = [sum(map(len, side.values())) for side in moves]
        self.sent, self.received = len(window.send.copies), len(window.receive.copies)


def kept(experts: int) -> Kept:
    """What rank 1 keeps in one window, of experts that all ranks share in turn."""
    plan = plan_with(experts)
    share = experts // RANKS
    held = shards_of(plan, [[number // share] for number in range(experts)], [[*range(RANKS)]])
    fused = [spec for spec in plan.hf.values() if spec.shape[:1] == (experts,)]
    fused = [spec for spec in fused if len(spec.shape) == 3]
    assert len(fused) == 2 * 2
    wanted = []
    for rank in range(RANKS):
        demands = []
        for spec in fused:
            whole, rows, columns = full_box(spec.shape)
            part = part_of((rows,), rank, RANKS)
            assert part is not None
            demands.append(Demand(spec.name, (whole, *part, columns)))
        wanted.append(tuple(demands))
    routes = Routes(plan, Roster(held, ()), Wanted(tuple(wanted)))
    moves = routes.of(1)
    one = schedule(plan, routes.places, moves, 1 << 30, list)
    assert len(one.windows) == 1

    def memory(box: Box, dtype: str) -> torch.Tensor:
        return torch.empty(box_shape(box), dtype=torch_dtype(dtype), device="meta")

    tensors = [LocalTensor(*own[:3], memory(own.box, own.dtype), False, True) for own in held[1]]
    packing = Packing(plan, tensors, EXACTLY, RANKS)
    places = {demand: memory(demand.box, plan.hf[demand.name].dtype) for demand in wanted[1]}
    buffers = [
        torch.empty(sum(one.nbytes(side)), dtype=torch.uint8, device="meta")
        for side in (moves.sent, moves.received)
    ]
    sides = (one.pieces(0, side) for side in moves)
    return Kept(moves, packing.window(*sides, *buffers, places.__getitem__))
