"""Who sends what to whom between a trainer and an engine, worked out for all ranks at once.

The engine's ranks want what Megatron ranks of the same sizes hold: engines split heads, columns,
rows, experts and the vocabulary in the same way. So both sides are megatron-core's own word, and
the plan makes Hugging Face boxes of them:

    shards of the trainer --plan--> boxes that are held  \
                                                          intersect
    shards of the engine  --plan--> boxes that are wanted /

A refit makes a move of each box of the plan. Here neighbours are one box, or there would be tens of
millions; senders and bytes are the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, TextIO

from megatron.bridge.errors import PlanError
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.exchange.route import Affinity, Holding, holdings
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, joined, volume
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


class Transfer(NamedTuple):
    """A box of a Hugging Face tensor that goes to ranks which want it.

    Attributes:
        box: of the tensor.
        holders: the ranks that hold it.
        senders: for each receiver the rank that sends to it, itself where it holds the box.
        receivers: the ranks that want it.
    """

    box: Box
    holders: tuple[int, ...]
    senders: tuple[int, ...]
    receivers: tuple[int, ...]


@dataclass(frozen=True)
class RefitRoute:
    """Who sends what to whom, of all ranks.

    Attributes:
        plan: between files and trainer.
        held: what the trainer holds of each Hugging Face tensor, box by box of the plan.
        wanted: what each rank of the world wants of each; replicas share one mapping.
        affinity: who of several holders sends.
    """

    plan: ConversionPlan
    held: Mapping[str, Sequence[tuple[Box, Holding]]]
    wanted: Sequence[Mapping[str, Sequence[Box]]]
    affinity: Affinity = field(default_factory=Affinity)

    @property
    def names(self) -> list[str]:
        """The tensors that the engine wants, in the order of the files."""
        wanted = {name for own in self._ranks_by_wish.values() for name in own[0]}
        return [name for name in self.plan.hf if name in wanted]

    @property
    def _ranks_by_wish(self) -> dict[int, tuple[Mapping[str, Sequence[Box]], list[int]]]:
        found: dict[int, tuple[Mapping[str, Sequence[Box]], list[int]]] = {}
        for rank, own in enumerate(self.wanted):
            found.setdefault(id(own), (own, []))[1].append(rank)
        return found

    def transfers(self) -> Iterator[tuple[str, list[Transfer]]]:
        """All of them, tensor by tensor.

        Raises:
            PlanError: the trainer does not hold all that is wanted, or some of it at two places in
                unlike parts.
        """
        wishes = list(self._ranks_by_wish.values())
        numbers = {name: number for number, name in enumerate(self.plan.hf)}
        for name in self.names:
            ranks: dict[Box, list[int]] = defaultdict(list)
            for own, of in wishes:
                for box in own.get(name, ()):
                    ranks[box] += of
            holders = BoxIndex(self._joined(name))
            senders = cache(
                lambda held, of, number=numbers[name]: tuple(
                    self.affinity.sender(held, receiver, number) for receiver in of
                )
            )
            found = []
            for box, of in ranks.items():
                receivers, arrived = tuple(sorted(of)), 0
                for shared, held in holders.overlapping(box):
                    arrived += volume(shared)
                    found.append(Transfer(shared, held, senders(held, receivers), receivers))
                if arrived != volume(box):
                    raise PlanError(
                        [f"{name}: {arrived} of the {volume(box)} values of it are held"],
                        heading="the trainer does not hold what the engine wants",
                    )
            yield name, found

    def _joined(self, name: str) -> list[tuple[Box, tuple[int, ...]]]:
        boxes: dict[tuple[int, ...], list[Box]] = defaultdict(list)
        for box, holding in self.held.get(name, ()):
            boxes[holding.holders].append(box)
        return [(box, held) for held, own in boxes.items() for box in joined(own)]

    def write(self, out: TextIO, facts: Mapping[str, Any]) -> None:
        """Write the route as JSON, one object a line.

        Args:
            out: the file.
            facts: of the first line.
        """
        lines = chain([dict(facts)], self._held_lines(), self._wanted_lines(), self._move_lines())
        out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)

    def _held_lines(self) -> Iterator[dict[str, Any]]:
        for name in self.names:
            for box, (copy, held, holders) in self.held[name]:
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

    def _wanted_lines(self) -> Iterator[dict[str, Any]]:
        for own, ranks in self._ranks_by_wish.values():
            for name, boxes in own.items():
                for box in boxes:
                    yield {"kind": "wanted", "ranks": ranks, "name": name, "box": box}

    def _move_lines(self) -> Iterator[dict[str, Any]]:
        for name, transfers in self.transfers():
            for box, _, senders, receivers in transfers:
                by_sender: dict[int, list[int]] = defaultdict(list)
                for sender, receiver in zip(senders, receivers, strict=True):
                    by_sender[sender].append(receiver)
                for sender, of in by_sender.items():
                    yield {
                        "kind": "move", "name": name, "box": box, "sender": sender, "receivers": of,
                    }  # fmt: skip


def route_between(
    plan: ConversionPlan,
    trainer: Sequence[tuple[Shard, ...]],
    replica: Sequence[tuple[Shard, ...]],
    engine: EngineLayout,
    affinity: Affinity,
) -> RefitRoute:
    """The route from what trainer ranks hold to what engine ranks want.

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
    idle = [nothing] * (world - len(trainer))
    roster = Roster((*trainer, *idle), ())
    wishes: dict[int, Mapping[str, Sequence[Box]]] = {}
    for own in replica:
        if id(own) not in wishes:
            wishes[id(own)] = wanted_boxes(plan, own)
    wanted: list[Mapping[str, Sequence[Box]]] = [{}] * before
    wanted += [wishes[id(own)] for own in replica] * engine.replicas
    wanted += [{}] * (world - len(wanted))
    return RefitRoute(plan, holdings(plan, roster), wanted, affinity)


def wanted_boxes(plan: ConversionPlan, shards: Iterable[Shard]) -> dict[str, list[Box]]:
    """What some shards are made of, in boxes of Hugging Face tensors."""
    keys: dict[str, list[Box]] = defaultdict(list)
    for shard in shards:
        keys[shard.key].append(shard.box)
    found: dict[str, list[Box]] = defaultdict(list)
    for key, boxes in keys.items():
        for box in joined(boxes):
            for shared, copy in plan.copies_to(key, box):
                found[copy.hf_name].append(hf_part(copy, shared))
    return {name: joined(boxes) for name, boxes in found.items()}
