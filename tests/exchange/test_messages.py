"""Messages past the buffers bring what messages through them bring, and both ends count alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest
import torch

from expert_shards import RANKS, plan_with, shards_of
from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.exchange.buffer_views import PackedWindow, Packing
from megatron.bridge.exchange.demand import Demand, Wanted
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.exchange.route import Moves, Routes
from megatron.bridge.exchange.transport import Message
from megatron.bridge.exchange.windows import Schedule, schedule
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.casting import EXACTLY
from megatron.bridge.tensors.boxes import box_shape, full_box, part_of

EXPERTS = 6
PLAN = plan_with(EXPERTS)
# Experts by themselves or by two, of all else the halves; some on several ranks.
HELD = shards_of(PLAN, [[0], [0], [1, 2], [3], [4], [4]], [[0, 3], [5]])
ENGINE = 2
"""Ranks of the engine, which are all of them in turn: each wants one of so many parts."""


def _values(rank: int) -> list[LocalTensor]:
    """What a rank holds; replicas hold the same."""
    found = []
    for shard in HELD[rank]:
        draw = torch.Generator().manual_seed(crc32(repr(shard[:3]).encode()))
        data = torch.randn(box_shape(shard.box), generator=draw).to(torch_dtype(shard.dtype))
        found.append(LocalTensor(*shard[:3], data, False, True))
    return found


def _targets(rank: int, *, as_held: bool) -> dict[Demand, torch.Tensor]:
    """Memory for parts of all tensors, with the axes as they are held or turned round."""
    found = {}
    for name, spec in PLAN.hf.items():
        if name in PLAN.carried:
            continue
        axis = 1 if len(spec.shape) == 3 else 0
        box = list(full_box(spec.shape))
        part = part_of((box[axis],), rank % ENGINE, ENGINE) if box else ()
        if part is None:
            continue
        box[axis : axis + 1] = part
        shape = list(box_shape(tuple(box)))
        turned = not as_held and len(shape) > 1
        if turned:
            shape[-2:] = shape[:-3:-1]
        memory = torch.zeros(shape, dtype=torch_dtype(spec.dtype))
        found[Demand(name, tuple(box))] = memory.mT if turned else memory
    return found


class Simulated:
    """All ranks of an exchange in one process."""

    def __init__(self, message_bytes: int | None, *, as_held: bool) -> None:
        self.held = [_values(rank) for rank in range(RANKS)]
        self.targets = [_targets(rank, as_held=as_held) for rank in range(RANKS)]
        wanted = Wanted(tuple(tuple(own) for own in self.targets))
        routes = Routes(PLAN, Roster(HELD, ()), wanted)
        self.moves = [routes.of(rank) for rank in range(RANKS)]
        schedules = [schedule(PLAN, routes.places, own, 1 << 30, list) for own in self.moves]
        self.windows = [self._window(rank, schedules[rank], message_bytes) for rank in range(RANKS)]

    def _window(self, rank: int, one: Schedule, message_bytes: int | None) -> PackedWindow:
        moves: Moves = self.moves[rank]
        assert len(one.windows) == 1
        buffers = [
            torch.zeros(sum(one.nbytes(side)), dtype=torch.uint8)
            for side in (moves.sent, moves.received)
        ]
        packing = Packing(PLAN, self.held[rank], EXACTLY, RANKS)
        sides = (one.pieces(0, side) for side in moves)
        place = self.targets[rank].__getitem__
        return packing.window(*sides, *buffers, place, message_bytes)

    def run(self) -> list[dict[Demand, torch.Tensor]]:
        for window in self.windows:
            window.send.copies.make()
            window.own.make()
        for sender, sending in enumerate(self.windows):
            for receiver, receiving in enumerate(self.windows):
                sent = _with(sending.send.traffic.messages, receiver)
                received = _with(receiving.receive.traffic.messages, sender)
                assert [len(one) for one in sent] == [len(one) for one in received]
                for of, to in zip(sent, received, strict=True):
                    to.copy_(of)
        for window in self.windows:
            window.receive.copies.make()
        return self.targets

    def past_buffers(self) -> list[tuple[int, int]]:
        """Of each rank the messages sent, and received, that lie in no buffer."""
        return [
            tuple(
                sum(
                    one.memory.untyped_storage().data_ptr()
                    != side.traffic.buffer.untyped_storage().data_ptr()
                    for one in side.traffic.messages
                )
                for side in (window.send, window.receive)
            )
            for window in self.windows
        ]


def _with(messages: Sequence[Message], peer: int) -> list[torch.Tensor]:
    return [one.memory for one in messages if one.peer == peer]


@pytest.mark.parametrize("as_held", [True, False])
@pytest.mark.parametrize("message_bytes", [16, 1000, 5000])
def test_messages_bring_what_buffers_bring(message_bytes: int, as_held: bool) -> None:
    expected: list[dict[Demand, Any]] = Simulated(None, as_held=as_held).run()
    exchange = Simulated(message_bytes, as_held=as_held)
    found = exchange.run()
    for own, one in zip(found, expected, strict=True):
        assert own.keys() == one.keys()
        for demand, memory in own.items():
            assert memory.any() or demand.name.endswith("norm.weight")
            assert torch.equal(memory, one[demand]), demand
    sent, received = map(sum, zip(*exchange.past_buffers(), strict=True))
    assert sent > 0
    assert received > 0 or not as_held
    for window in exchange.windows:
        for side in (window.send, window.receive):
            assert sum(len(one.memory) for one in side.traffic.messages) == side.nbytes


def test_each_expert_is_a_message_where_all_are_one_move() -> None:
    """A rank that has two experts in memories of their own sends both past its buffer."""
    exchange = Simulated(1000, as_held=True)
    memories = {one.data.data_ptr() for one in exchange.held[0] if ".experts.experts." in one.key}
    sent = {one.memory.data_ptr() for one in exchange.windows[0].send.traffic.messages}
    assert len(memories & sent) > 2


def test_small_pieces_share_a_message() -> None:
    exchange = Simulated(1 << 20, as_held=True)
    for window in exchange.windows:
        for side in (window.send, window.receive):
            peers = [one.peer for one in side.traffic.messages]
            assert len(peers) == len(set(peers))
