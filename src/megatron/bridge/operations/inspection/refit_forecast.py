"""What a refit between a trainer and an engine costs, worked out for all ranks at once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.route import Affinity, Routes, Transfer
from megatron.bridge.exchange.windows import (
    WINDOW_BYTES,
    Cutting,
    Schedule,
    Unit,
    fitted,
    slot_bytes,
)
from megatron.bridge.formats.torch_dist.collection import without_collection
from megatron.bridge.operations.inspection.cluster_legality import blueprint_of, layout_of
from megatron.bridge.operations.inspection.forecast import Forecast
from megatron.bridge.operations.inspection.rank_shards import shards_of_ranks
from megatron.bridge.operations.inspection.refit_route import EngineLayout, route_between
from megatron.bridge.progress import Progress
from megatron.bridge.tensors.boxes import Shape, box_shape, volume
from megatron.bridge.text.document import stated

ASSUMED_BYTES_PER_SECOND = 50e9
"""Of a link of 400 Gbit/s; assumed, not measured."""

type Numbers = np.ndarray[Any, np.dtype[np.int64]]


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


class _Amounts:
    """The bytes of routes, rank by rank."""

    def __init__(self, routes: Routes) -> None:
        self._plan, self._per_node = routes.plan, routes.affinity.ranks_per_node
        self._world = len(routes.wanted.by_rank)
        self.own_bytes = self.within_node_bytes = 0
        self.forced = np.zeros(self._world, np.int64)  # what nobody else could send
        self.holders: set[int] = set()
        self._loads: dict[str, Numbers] = {}
        # By tensor and the shape of a box: how many of these each rank [sends, receives].
        self._times = {name: self._counted(routes.transfers(name)) for name in routes.names}

    def _counted(self, transfers: Iterable[Transfer]) -> dict[Shape, Numbers]:
        ends: dict[Shape, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for one in transfers:
            dtype = self._plan.hf[one.demand.name].dtype
            size, sent, received = slot_bytes(one.box, dtype), *ends[box_shape(one.box)]
            pairs = [
                (sender, receiver)
                for sender, receiver in zip(one.senders, one.receivers, strict=True)
                if sender != receiver
            ]
            own = len(one.receivers) - len(pairs)
            self.own_bytes += own * volume(one.box) * itemsize(dtype)
            self.holders.update(one.holding.holders)
            if (per_node := self._per_node) is not None:
                near = sum(sender // per_node == receiver // per_node for sender, receiver in pairs)
                self.within_node_bytes += near * size
            if len(one.holding.holders) == 1:
                self.forced[one.holding.holders[0]] += len(pairs) * size
            sent += [sender for sender, _ in pairs]
            received += [receiver for _, receiver in pairs]
        return {
            shape: np.stack([np.bincount(ranks, minlength=self._world) for ranks in of])
            for shape, of in ends.items()
            if of[0]
        }

    def most(self, cutting: Cutting, changed: Iterable[str]) -> Sequence[int]:
        """As of `Loads`."""
        for name in changed:
            loads = self._loads[name] = np.zeros((cutting.parts[name], 2, self._world), np.int64)
            for shape, times in self._times[name].items():
                loads += np.multiply.outer(np.array(cutting.slots(name, shape)), times)
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
    routes: Routes,
    engine: EngineLayout,
    bytes_per_second: float | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> RefitForecast:
    """What a refit over routes moves.

    Args:
        routes: of all ranks.
        engine: that is filled.
        bytes_per_second: that a rank sends, and receives, at once; None for an assumed rate.
        window_bytes: see `Refit`.
    """
    rate = bytes_per_second or ASSUMED_BYTES_PER_SECOND
    with without_collection():
        amounts = _Amounts(routes)
        cutting = Cutting(routes.plan, dict.fromkeys(routes.names, 1))
        schedule = fitted(cutting, routes.places, amounts, window_bytes)
    wanted = routes.wanted.by_rank
    world = len(wanted)
    total, largest = np.zeros((2, world), np.int64), np.zeros((2, world), np.int64)
    slowest = 0
    for load in amounts.of_windows(schedule):
        total += load
        largest = np.maximum(largest, load)
        slowest += int(load.max())
    sent, received = total
    taking = np.array([bool(own) for own in wanted])
    holding = np.array(sorted(amounts.holders), np.int64)
    moved = int(sent.sum())
    per_node = routes.affinity.ranks_per_node
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
) -> Routes:
    """The routes between a trainer and an engine, neither of which has to be there.

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
