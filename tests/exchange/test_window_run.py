"""A refusal in the middle of an exchange leaves nothing under way: it would arrive later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from expert_shards import RANKS, plan_with, shards_of
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.buffer_views import PackedWindow, Packing
from megatron.bridge.exchange.demand import Demand, Wanted
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.exchange.route import Routes
from megatron.bridge.exchange.transport import Traffic, Transport, Wait
from megatron.bridge.exchange.window_run import Exchange
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.casting import EXACTLY
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.boxes import full_box


class Noting(Transport):
    """Moves nothing; notes which window was begun, and which was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []
        self.done: list[int] = []

    def start(self, send: Traffic, receive: Traffic) -> Wait:
        number = len(self.begun)
        self.begun.append(number)
        return lambda: self.done.append(number)


@pytest.mark.parametrize("refused", [1, 2])
def test_what_is_under_way_is_waited_for(refused: int) -> None:
    plan, transport, device = plan_with(5), Noting(), torch.device("cpu")
    held = shards_of(plan, [[0]] * 5, [[0]])[0]
    demand = Demand("lm_head.weight", full_box(plan.hf["lm_head.weight"].shape))
    routes = Routes(plan, Roster((held,), ()), Wanted(((demand,),)))
    exchange = Exchange(routes, Ranks(), transport, 1 << 20, device)
    (units,) = exchange.schedule.windows
    exchange.schedule = replace(exchange.schedule, windows=(units, (), (), ()))
    tensors = [
        LocalTensor(*one[:3], torch.zeros(one.key_shape, dtype=torch.bfloat16), False, True)
        for one in held
        if one.key.endswith("output_layer.weight")
    ]
    packing = Packing(plan, tensors, EXACTLY, RANKS)
    memory = torch.ones(plan.hf[demand.name].shape, dtype=torch.bfloat16)

    def windows() -> Iterator[PackedWindow]:
        for number in range(refused):
            yield exchange.packed(number, packing, lambda _: memory)
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        list(exchange.run(windows()))
    assert transport.done == transport.begun == [*range(refused)]
    assert not memory.any()
