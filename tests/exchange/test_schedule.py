"""Windows: no rank sends or receives more than it may in one, and all have something to send."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

import plans_of
import released_configs as released
from megatron.bridge.dtypes import itemsize
from megatron.bridge.exchange.demand import Wanted, whole_tensors
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.exchange.route import Routes
from megatron.bridge.exchange.windows import Schedule, schedule, slot_bytes
from megatron.bridge.tensors.boxes import full_box, volume

WINDOW = 24_000
STAGES = 2
"""Ranks with half of the layers each; two more ranks want all of it."""


class Meeting:
    """Threads that tell one another lists, as ranks do by a collective."""

    def __init__(self, count: int) -> None:
        self._told: list[Sequence[int]] = [()] * count
        self._barrier = threading.Barrier(count, timeout=60)

    def of(self, rank: int) -> Callable[[Sequence[int]], list[int]]:
        def largest(own: Sequence[int]) -> list[int]:
            self._told[rank] = own
            self._barrier.wait()
            found = [max(values) for values in zip(*self._told, strict=True)]
            self._barrier.wait()
            return found

        return largest


@pytest.fixture(scope="module")
def routes() -> Routes:
    config = plans_of.small(released.QWEN3_VL_2B)
    plan = plans_of.plan(config, plans_of.tensors_of(config))
    shards: list[list[Shard]] = [[], [], [], []]
    for number, (key, spec) in enumerate(plan.megatron.items()):
        stage = number * STAGES // len(plan.megatron)
        shards[stage].append(Shard(key, spec.shape, full_box(spec.shape), spec.dtype, False))
    held = tuple(map(tuple, shards))
    roster = Roster(held, tuple((True,) * len(own) for own in held))
    names = [name for name in plan.hf if name not in plan.carried]
    wanted = tuple(whole_tensors(plan, names))
    return Routes(plan, roster, Wanted(((), (), wanted, wanted)))


def schedules(routes: Routes, *, by_turns: bool) -> list[Schedule]:
    """That of each rank."""
    meeting = Meeting(4)
    places = {
        name: routes.holders_of(name) if by_turns else ()
        for name in routes.wanted.names(routes.plan)
    }

    def of(rank: int) -> Schedule:
        moves = routes.sends(rank), routes.receives(rank)
        return schedule(routes.plan, places, moves, WINDOW, 4, meeting.of(rank))

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(of, range(4)))


def sent(routes: Routes, one: Schedule, rank: int) -> list[int]:
    """Bytes of each window."""
    return [
        sum(slot_bytes(routes.plan, move) for move in moves)
        for moves in one.by_window(routes.sends(rank))
    ]


@pytest.mark.parametrize("by_turns", [False, True])
def test_no_window_is_too_large(routes: Routes, by_turns: bool) -> None:
    found = schedules(routes, by_turns=by_turns)
    assert len({one.windows for one in found}) == 1
    for rank, one in enumerate(found):
        received = one.by_window(routes.receives(rank))
        assert max(sent(routes, one, rank)) <= WINDOW
        assert max(sum(slot_bytes(routes.plan, m) for m in moves) for moves in received) <= WINDOW
    whole = sum(spec.nbytes for name, spec in routes.plan.hf.items())
    arrived = sum(
        volume(move.box) * itemsize(routes.plan.hf[move.name].dtype)
        for moves in found[3].by_window(routes.receives(3))
        for move in moves
    )
    assert arrived == whole


def test_a_window_ends_only_where_one_more_unit_would_be_too_much(routes: Routes) -> None:
    found = schedules(routes, by_turns=True)
    loads = [(sent(routes, one, rank)) for rank, one in enumerate(found)]
    received = [
        [
            sum(slot_bytes(routes.plan, m) for m in moves)
            for moves in one.by_window(routes.receives(rank))
        ]
        for rank, one in enumerate(found)
    ]
    for number in range(len(found[0].windows) - 1):
        of_both = max(
            side[rank][number] + side[rank][number + 1]
            for side in (loads, received)
            for rank in range(4)
        )
        assert of_both > WINDOW


def test_all_stages_send_all_the_time(routes: Routes) -> None:
    in_order = schedules(routes, by_turns=False)
    by_turns = schedules(routes, by_turns=True)
    assert any(0 in sent(routes, in_order[rank], rank)[:-1] for rank in range(STAGES))
    for rank in range(STAGES):
        assert all(sent(routes, by_turns[rank], rank)[:-1])
    assert len(by_turns[0].windows) < len(in_order[0].windows)
