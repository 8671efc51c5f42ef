"""What a refit between a trainer and an engine moves, worked out for all ranks at once.

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
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, Self, TextIO

import numpy as np

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.exchange.route import Affinity, Holding, holdings
from megatron.bridge.exchange.windows import (
    WINDOW_BYTES,
    Cutting,
    Schedule,
    Unit,
    box_slot_bytes,
    fitted,
)
from megatron.bridge.formats.torch_dist.collection import without_collection
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.operations.inspection.cluster_legality import blueprint_of, layout_of
from megatron.bridge.operations.inspection.forecast import Forecast
from megatron.bridge.operations.inspection.rank_shards import shards_of_ranks
from megatron.bridge.progress import Progress
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, joined, volume
from megatron.bridge.text.document import stated

ASSUMED_BYTES_PER_SECOND = 50e9
"""Of a link of 400 Gbit/s; assumed, not measured."""

type Numbers = np.ndarray[Any, np.dtype[np.int64]]


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


@dataclass(frozen=True, slots=True)
class Spread:
    """Bytes of ranks.

    Attributes:
        ranks: how many there are.
        least: of any of them.
        mean: of all of them.
        most: of any of them.
    """

    ranks: int
    least: int
    mean: int
    most: int

    @classmethod
    def of(cls, numbers: Numbers) -> Self:
        """Of one number for each rank, at least one."""
        found = numbers.tolist()
        return cls(len(found), min(found), sum(found) // len(found), max(found))


@dataclass(frozen=True)
class RefitForecast:
    """What a refit moves.

    Attributes:
        engine: that is filled.
        ranks: of trainer and engine together.
        ranks_per_node: consecutive ranks that share a node; None where that is not known.
        window_bytes: that a rank sends, and receives, at a time.
        bytes_per_second: that a rank sends, and receives; assumed.
        windows: how many there are.
        moved_bytes: between ranks, all of them together.
        within_node_bytes: of these, between ranks of one node.
        own_bytes: that ranks hold and want, which do not travel.
        sent: by each rank that holds a part of the model.
        received: by each rank of the engine.
        buffers: memory of each rank that takes part, beside model and engine.
        limit_bytes: that one rank has to send or receive at least, on whatever route.
        seconds: that the windows take one after another, packing and latency left out.
    """

    engine: EngineLayout
    ranks: int
    ranks_per_node: int | None
    window_bytes: int
    bytes_per_second: float
    windows: int
    moved_bytes: int
    within_node_bytes: int | None
    own_bytes: int
    sent: Spread
    received: Spread
    buffers: Spread
    limit_bytes: int
    seconds: float

    @stated
    def limit_seconds(self) -> float:
        """The least time that any route takes."""
        return self.limit_bytes / self.bytes_per_second


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


class _Counted(NamedTuple):
    """A transfer between ranks: who sends it how often, and who receives it."""

    box: Box
    senders: Numbers
    times: Numbers
    receivers: Numbers


class _Amounts:
    """The bytes of a route, rank by rank."""

    def __init__(self, route: RefitRoute) -> None:
        self.route = route
        world = len(route.wanted)
        self.own_bytes = self.within_node_bytes = 0
        self.forced = np.zeros(world, np.int64)  # what nobody else could send
        self.moves: dict[str, list[_Counted]] = {}
        self.holders: set[int] = set()
        self._loads: dict[str, Numbers] = {}
        self._world = world
        for name, transfers in route.transfers():
            self.moves[name] = [
                counted for one in transfers if (counted := self._counted(name, one)) is not None
            ]

    def _counted(self, name: str, one: Transfer) -> _Counted | None:
        dtype, per_node = self.route.plan.hf[name].dtype, self.route.affinity.ranks_per_node
        pairs = [
            (sender, receiver)
            for sender, receiver in zip(one.senders, one.receivers, strict=True)
            if sender != receiver
        ]
        size = box_slot_bytes(one.box, dtype)
        own = len(one.receivers) - len(pairs)
        self.own_bytes += own * volume(one.box) * itemsize(dtype)
        self.holders.update(one.holders)
        if not pairs:
            return None
        if per_node is not None:
            near = sum(sender // per_node == receiver // per_node for sender, receiver in pairs)
            self.within_node_bytes += near * size
        if len(one.holders) == 1:
            self.forced[one.holders[0]] += len(pairs) * size
        times = Counter(sender for sender, _ in pairs)
        return _Counted(
            one.box,
            np.array(list(times), np.int64),
            np.array(list(times.values()), np.int64),
            np.array([receiver for _, receiver in pairs], np.int64),
        )

    def most(self, cutting: Cutting, changed: Iterable[str]) -> Sequence[int]:
        """As of `Loads`."""
        for name in changed:
            dtype = self.route.plan.hf[name].dtype
            loads = self._loads[name] = np.zeros((cutting.parts[name], 2, self._world), np.int64)
            for box, senders, times, receivers in self.moves[name]:
                for unit, shared in cutting.cut(name, box):
                    size = box_slot_bytes(shared, dtype)
                    sent, received = loads[unit.part]
                    sent[senders] += times * size
                    received[receivers] += size
        return [int(most) for name in cutting.parts for most in self._loads[name].max((1, 2))]

    def ends(self, units: Sequence[Unit], window_bytes: int) -> Sequence[int]:
        """As of `Loads`."""
        ends, end, held = [], 0, np.zeros((2, self._world), np.int64)
        for start, unit in enumerate(units):
            while end < len(units):
                more = held + self._of(units[end])
                if end > start and more.max() > window_bytes:
                    break
                held, end = more, end + 1
            ends.append(end)
            held = held - self._of(unit)
        return ends

    def of_windows(self, schedule: Schedule) -> Iterator[Numbers]:
        """[sent or received, rank] of each window."""
        for units in schedule.windows:
            yield sum(map(self._of, units), start=np.zeros((2, self._world), np.int64))

    def _of(self, unit: Unit) -> Numbers:
        return self._loads[unit.name][unit.part]


def forecast_refit(
    route: RefitRoute,
    engine: EngineLayout,
    bytes_per_second: float | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> RefitForecast:
    """What a refit over a route moves.

    Args:
        route: of all ranks.
        engine: that is filled.
        bytes_per_second: that a rank sends, and receives, at once; None for an assumed rate.
        window_bytes: see `Refit`.
    """
    rate = bytes_per_second or ASSUMED_BYTES_PER_SECOND
    with without_collection():
        amounts = _Amounts(route)
        cutting = Cutting(route.plan, dict.fromkeys(amounts.moves, 1), len(route.wanted))
        places = {name: route.held[name][0][1].holders for name in amounts.moves}
        schedule = fitted(cutting, places, amounts, window_bytes)
    world = len(route.wanted)
    total, largest = np.zeros((2, world), np.int64), np.zeros((2, world), np.int64)
    slowest = 0
    for load in amounts.of_windows(schedule):
        total += load
        largest = np.maximum(largest, load)
        slowest += int(load.max())
    sent, received = total
    taking = np.array([bool(own) for own in route.wanted])
    holding = np.array(sorted(amounts.holders), np.int64)
    moved = int(sent.sum())
    per_node = route.affinity.ranks_per_node
    return RefitForecast(
        engine=engine,
        ranks=world,
        ranks_per_node=per_node,
        window_bytes=window_bytes,
        bytes_per_second=rate,
        windows=len(schedule.windows),
        moved_bytes=moved,
        within_node_bytes=None if per_node is None else amounts.within_node_bytes,
        own_bytes=amounts.own_bytes,
        sent=Spread.of(sent[holding]),
        received=Spread.of(received[taking]),
        # Two of each direction, see `Exchange`.
        buffers=Spread.of(2 * largest.sum(0)),
        limit_bytes=max(int(received.max()), int(amounts.forced.max()), -(-moved // len(holding))),
        seconds=slowest / rate,
    )


def plan_refit(
    report: Forecast,
    engine: EngineLayout,
    without: Collection[str] = (),
    ranks_per_node: int | None = None,
    progress: Progress | None = None,
) -> RefitRoute:
    """The route between a trainer and an engine, neither of which has to be there.

    Args:
        report: of the model, laid out as the trainer has it.
        engine: that is to be filled.
        without: parts that the model is laid out without.
        ranks_per_node: consecutive ranks that share a node; None where that is not known.
        progress: told of the ranks that are built.

    Raises:
        InputError: the engine has more ranks than the trainer, and is not disjoint from it.
        PlanError: the engine cannot have these sizes.
    """
    if report.plan is None or report.layout is None:
        raise ValueError(f"{report.source}: it is not laid out")
    trainer = report.layout.sizes
    if engine.ranks > trainer.ranks and not engine.disjoint:
        fitting = trainer.ranks // engine.sizes.ranks
        fewer = f"replicas={fitting} do, and " if fitting else ""
        raise InputError(
            f"--refit {engine}: its {engine.ranks} ranks are not among the {trainer.ranks} of the "
            f"trainer; {fewer}disjoint gives it ranks of its own"
        )
    try:
        layout_of(report, engine.sizes, without=without)
    except PlanError as error:
        problems = [re.sub(r"--(\w+) (?=\d)", r"\1=", problem) for problem in error.problems]
        heading = f"the engine of --refit {engine} cannot be laid out so"
        raise PlanError(problems, heading=heading) from error
    model = blueprint_of(report, without)
    held = shards_of_ranks(model, trainer, progress)
    replica = shards_of_ranks(model, engine.sizes, progress)
    with without_collection():
        return route_between(report.plan, held, replica, engine, Affinity(ranks_per_node))
