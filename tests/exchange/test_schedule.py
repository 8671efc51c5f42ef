"""Windows: no rank sends or receives more than it may in one, and all have something to send."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

import plans_of
import released_configs as released
from megatron.bridge.exchange.demand import Wanted, whole_tensors
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.exchange.route import MovesByName, Routes
from megatron.bridge.exchange.windows import Schedule, schedule
from megatron.bridge.tensors.boxes import full_box, tiling_faults

WINDOW = 24_000
STAGES = 2
"""Ranks with about half of the bytes each; two more ranks want all of it."""


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
    before = 0
    for key, spec in plan.megatron.items():
        stage = before * STAGES // plan.megatron_bytes
        before += spec.nbytes
        shards[stage].append(Shard(key, spec.shape, full_box(spec.shape), spec.dtype, False))
    held = tuple(map(tuple, shards))
    roster = Roster(held, tuple((True,) * len(own) for own in held))
    names = [name for name in plan.hf if name not in plan.carried]
    wanted = tuple(whole_tensors(plan, names))
    routes = Routes(plan, roster, Wanted(((), (), wanted, wanted)))
    routes.check()
    return routes


def schedules(routes: Routes, *, by_turns: bool) -> list[Schedule]:
    """That of each rank."""
    meeting = Meeting(4)
    places = routes.places if by_turns else dict.fromkeys(routes.names)

    def of(rank: int) -> Schedule:
        return schedule(routes.plan, places, routes.of(rank), WINDOW, meeting.of(rank))

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(of, range(4)))


def sent(routes: Routes, one: Schedule, rank: int) -> list[int]:
    """Bytes of each window."""
    return nbytes(one, routes.of(rank).sent)


def received(routes: Routes, one: Schedule, rank: int) -> list[int]:
    """Likewise."""
    return nbytes(one, routes.of(rank).received)


def nbytes(one: Schedule, moves: MovesByName) -> list[int]:
    """Those that the pieces of each window have, which are as many as the windows were made by."""
    found = [
        sum(part.nbytes * len(move.peers) for move, part in one.pieces(number, moves))
        for number in range(len(one.windows))
    ]
    assert found == one.nbytes(moves)
    return found


@pytest.mark.parametrize("by_turns", [False, True])
def test_no_window_is_too_large(routes: Routes, by_turns: bool) -> None:
    found = schedules(routes, by_turns=by_turns)
    assert len({one.windows for one in found}) == 1
    for rank, one in enumerate(found):
        assert max(sent(routes, one, rank)) <= WINDOW
        assert max(received(routes, one, rank)) <= WINDOW


def test_all_that_is_wanted_arrives(routes: Routes) -> None:
    one = schedules(routes, by_turns=True)[3]
    arrived = defaultdict(list)
    for number in range(len(one.windows)):
        for piece in one.pieces(number, routes.of(3).received):
            arrived[piece.move.name].append(piece.box)
    assert arrived.keys() == set(routes.names)
    for name, boxes in arrived.items():
        assert not list(tiling_faults(routes.plan.hf[name].shape, boxes))


def test_a_window_ends_only_where_one_more_unit_would_be_too_much(routes: Routes) -> None:
    found = schedules(routes, by_turns=True)
    loads = [side(routes, one, rank) for rank, one in enumerate(found) for side in (sent, received)]
    for number in range(len(found[0].windows) - 1):
        assert max(load[number] + load[number + 1] for load in loads) > WINDOW


def test_all_stages_send_all_the_time(routes: Routes) -> None:
    in_order = schedules(routes, by_turns=False)
    by_turns = schedules(routes, by_turns=True)
    assert any(0 in sent(routes, in_order[rank], rank)[:-1] for rank in range(STAGES))
    for rank in range(STAGES):
        assert all(sent(routes, by_turns[rank], rank)[:-1])
    assert len(by_turns[0].windows) < len(in_order[0].windows)
