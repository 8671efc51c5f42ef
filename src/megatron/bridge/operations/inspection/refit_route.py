"""Who sends what to whom between a trainer and an engine, worked out for all ranks at once.

The engine's ranks want what Megatron ranks of the same sizes hold: engines split heads, columns,
rows, experts and the vocabulary in the same way. So both sides are megatron-core's own word, and
the plan makes Hugging Face boxes of them:

    shards of the trainer --plan--> boxes that are held  \
                                                          intersect
    shards of the engine  --plan--> boxes that are wanted /

The routes are those of a refit of these boxes: the same moves, senders and bytes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

from megatron.bridge.exchange.demand import Demand, Wanted
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.exchange.route import Affinity, Routes
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, joined
from megatron.bridge.text.document import stated


@dataclass(frozen=True)
class EngineLayout:
    """How an inference engine is split.

    Attributes:
        tp: tensor parallelism.
        pp: pipeline stages.
        ep: ranks of a replica that share the routed experts.
        etp: tensor parallelism of the routed experts; None for whole experts where `ep` splits
            them, and for `tp` where it does not.
        replicas: of the engine.
        disjoint: whether its ranks are others than the trainer's, which come first; else they are
            the first ones of the trainer's.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    replicas: int = 1
    disjoint: bool = False

    @property
    def sizes(self) -> ParallelSizes:
        """Of one replica."""
        etp = self.etp or (self.tp if self.ep == 1 else 1)
        return ParallelSizes(tp=self.tp, pp=self.pp, ep=self.ep, etp=etp)

    @stated
    def ranks(self) -> int:
        """Of all replicas."""
        return self.replicas * self.sizes.ranks

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "etp": self.etp}
        given = [f"{name}={size}" for name, size in sizes.items() if size not in (None, 1)]
        given += [f"replicas={self.replicas}"] if self.replicas > 1 else []
        return ",".join(given + (["disjoint"] if self.disjoint else [])) or "tp=1"


def route_between(
    plan: ConversionPlan,
    trainer: Sequence[tuple[Shard, ...]],
    replica: Sequence[tuple[Shard, ...]],
    engine: EngineLayout,
    affinity: Affinity,
) -> Routes:
    """The routes from what trainer ranks hold to what engine ranks want.

    Args:
        plan: between files and trainer.
        trainer: what each of its ranks holds.
        replica: what each rank of one replica of the engine would hold as a Megatron rank.
        engine: of which this is a replica.
        affinity: who of several holders sends.
    """
    before = len(trainer) if engine.disjoint else 0
    world = max(len(trainer), before + engine.ranks)
    nothing: tuple[Shard, ...] = ()
    roster = Roster((*trainer, *[nothing] * (world - len(trainer))), ())
    # Replicas want the same.
    wishes = {id(own): own for own in replica}
    demands = {key: tuple(_demands(plan, own)) for key, own in wishes.items()}
    wanted: list[tuple[Demand, ...]] = [()] * before
    wanted += [demands[id(own)] for own in replica] * engine.replicas
    wanted += [()] * (world - len(wanted))
    return Routes(plan, roster, Wanted(tuple(wanted)), affinity)


def _demands(plan: ConversionPlan, shards: Iterable[Shard]) -> Iterator[Demand]:
    """What some shards are made of."""
    keys: dict[str, list[Box]] = defaultdict(list)
    for shard in shards:
        keys[shard.key].append(shard.box)
    found: dict[str, list[Box]] = defaultdict(list)
    for key, boxes in keys.items():
        for box in joined(boxes):
            for shared, copy in plan.joined_copies_to(key, box):
                found[copy.hf_name].append(hf_part(copy, shared))
    return (Demand(name, box) for name, boxes in found.items() for box in joined(boxes))


def write_routes(routes: Routes, out: TextIO, facts: Mapping[str, Any]) -> None:
    """Write routes as JSON, one object a line.

    Args:
        routes: of all ranks.
        out: the file.
        facts: of the first line.
    """
    lines = chain([dict(facts)], _held_lines(routes), _wanted_lines(routes), _move_lines(routes))
    out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def _held_lines(routes: Routes) -> Iterator[dict[str, Any]]:
    for name in routes.names:
        for box, (copy, held, holders) in routes.holdings_of(name):
            yield {
                "kind": "held",
                "ranks": holders,
                "name": name,
                "box": box,
                "key": copy.megatron_key,
                "key_box": megatron_part(copy, box),
                "rank_box": held,
                "transpose": copy.transpose,
                "offset": copy.offset,
            }


def _wanted_lines(routes: Routes) -> Iterator[dict[str, Any]]:
    for demands, ranks in routes.wanted.distinct:
        for name, box in demands:
            yield {"kind": "wanted", "ranks": ranks, "name": name, "box": box}


def _move_lines(routes: Routes) -> Iterator[dict[str, Any]]:
    for name in routes.names:
        for one in routes.transfers(name):
            by_sender: dict[int, list[int]] = defaultdict(list)
            for sender, receiver in zip(one.senders, one.receivers, strict=True):
                by_sender[sender].append(receiver)
            for sender, of in by_sender.items():
                yield {
                    "kind": "move", "name": name, "box": one.box, "sender": sender, "receivers": of,
                }  # fmt: skip
