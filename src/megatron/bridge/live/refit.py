"""Refit: the weights of a live model into the memory of others, again and again.

What is to move is worked out once. Each refit after that packs, sends and unpacks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.exchange.agreement import check_same_plan, check_same_settings
from megatron.bridge.exchange.buffer_views import Packing
from megatron.bridge.exchange.delta_run import DeltaRun
from megatron.bridge.exchange.demand import Demand, Wanted
from megatron.bridge.exchange.landing import (
    Landing,
    Targets,
    check_kept,
    check_landings,
    landings_of,
)
from megatron.bridge.exchange.low_rank import LowRank
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.exchange.route import Affinity, Routes
from megatron.bridge.exchange.target_memory import check_memory
from megatron.bridge.exchange.transport import Transport, TransportName, transport_between
from megatron.bridge.exchange.window_run import Exchange
from megatron.bridge.exchange.windows import WINDOW_BYTES, check_window_bytes
from megatron.bridge.live.fp8_targets import FP8Targets
from megatron.bridge.live.local_tensors import (
    LocalTensor,
    check_planned,
    local_tensors,
    with_memory,
)
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.runtime.ranks import Ranks

_BEGUN, _ARRIVED = 0, 1


@dataclass(frozen=True)
class RefitReport:
    """What a refit moved, on this rank.

    Attributes:
        version: of the weights that have arrived, from 1.
        windows: how many there were.
        collectives: how many calls all ranks made together.
        is_delta: whether only what changed since the last refit was sent.
        sent_bytes: to other ranks.
        received_bytes: from other ranks.
        own_bytes: that this rank copied to itself.
        buffer_bytes: of memory beside the model and the targets.
        seconds: that it took.
    """

    version: int
    windows: int
    collectives: int
    is_delta: bool
    sent_bytes: int
    received_bytes: int
    own_bytes: int
    buffer_bytes: int
    seconds: float


class Refit:
    """The weights of a live model into memory of any ranks, prepared once and called each step.

    Every rank of the group makes one, whether it has a part of the model, targets, or both, and
    every rank calls it. Values go straight from a rank that holds them to each that wants them.

    Args:
        model: the chunks of this rank; none where it has no part of the model.
        targets: the memory that this rank wants filled.
        plan: of the model, the same on every rank.
        group: of the ranks, None for all of them.
        window_bytes: that a rank sends, and receives, at a time. Buffers take four times as much.
        affinity: who of several ranks that hold the same sends it.
        casting: of values that the plan's dtypes do not hold.
        fp8: extents of a block of the weights that targets have in FP8; None if that is not known,
            and then there are none.
        merge: adapters of this rank's weights, whose products are added to them: what travels is
            the merged weight, rounded once.
        delta: from the second refit on send only what changed, found bit by bit. Then the model's
            memory is kept once more, and targets have to stay as the last refit left them: where
            one has not, all is sent. Nor may it be narrower than what is sent.
        transport: "point-to-point" moves a window's bytes by messages between the pairs of ranks
            that have some, on CPUs the large ones from memory to memory, past the buffers;
            "all-to-all" by one collective.

    Raises:
        PlanError: the ranks do not hold the model, or it cannot give what a target wants.
        InputError: a target does not fit, the ranks have different plans or settings, or another
            rank cannot go on.

    Attributes:
        prepare_seconds: that it took to make.
        exchange: of all ranks.
        windows: of this rank, in order, as long as neither the model's memory nor the targets'
            changes.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        targets: Targets,
        plan: ConversionPlan,
        *,
        group: dist.ProcessGroup | None = None,
        window_bytes: int = WINDOW_BYTES,
        affinity: Affinity = Affinity(),  # noqa: B008 - frozen
        casting: Casting = EXACTLY,
        fp8: BlockFP8 | None = None,
        merge: Iterable[LowRank] = (),
        delta: bool = False,
        transport: TransportName = "point-to-point",
    ) -> None:
        begin = time.perf_counter()
        self._ranks, self._plan, self._casting = Ranks(group), plan, casting
        self._delta, self._model, self._merge = delta, list(model), list(merge)
        self._then: list[LocalTensor] = []

        def checked_transport() -> Transport:
            check_window_bytes(window_bytes)
            affinity.check()
            return transport_between(self._ranks, transport)

        self._transport = self._ranks.together(checked_transport)
        check_same_settings(
            self._ranks,
            {
                "window_bytes": window_bytes,
                "ranks_per_node": affinity.ranks_per_node,
                "round": casting.rounds or casting.rounded or False,
                "fp8": fp8,
                "delta": delta,
                "transport": transport,
            },
        )
        check_same_plan(self._ranks, plan)
        self._landings, held = self._ranks.together(lambda: self._found(targets))
        self._device = _device_of(held, self._landings, self._ranks)
        self._fp8 = FP8Targets.of(plan, self._landings, fp8, self._ranks, self._device)
        if self._fp8 is not None:
            plan = self._plan = self._fp8.plan
            held = [*held, *self._fp8.held]
        self._ranks.together(lambda: self._check_targets(held))
        roster = Roster.of(self._ranks, held)
        wanted = Wanted.of(self._ranks, (landing.demand for landing in self._landings))
        routes = Routes(plan, roster, wanted, affinity)
        self._shards = roster.by_rank[self._ranks.index]
        self.exchange = Exchange(
            routes,
            self._ranks,
            self._transport,
            window_bytes,
            self._device,
            by_turns=True,
        )
        self._ranks.together(lambda: self._make_views(held))
        computes = self._ranks.largest([one.computes for one in self.windows], self._device)
        self._sure = {number for number, one in enumerate(computes) if not one}
        self._version = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.prepare_seconds = time.perf_counter() - begin

    @property
    def version(self) -> int:
        """Of the weights in the targets of this rank, 0 before the first refit has arrived."""
        return int(self._version[_ARRIVED])

    @property
    def is_whole(self) -> bool:
        """Whether all targets have the weights of one version: not while a refit is under way."""
        return bool(self._version[_BEGUN] == self._version[_ARRIVED])

    @torch.no_grad()
    def __call__(self) -> RefitReport:
        """Move the weights that the model has now; every rank calls this.

        Raises:
            InputError: the ranks are not at the same version, a rank's model is split otherwise
                than it was, or another rank cannot go on or is gone. Then targets may have weights
                of two versions (`is_whole`) until the next refit.
            InexactCast: values do not fit the dtype that they are to have.
        """
        begin = time.perf_counter()
        self._check_versions(self._ranks.all_of(self._ready))
        if self._fp8 is not None:
            self._fp8.find(self._ranks)
        is_delta = self._delta and self.is_whole and self.version > 0
        self._version[_BEGUN] += 1
        if is_delta:
            is_delta = not any(self._ranks.largest([not self._changes().run()], self._device))
        if not is_delta:
            for _ in self.exchange.run(self.windows, self._sure):
                pass
        # Nobody has the new version before everybody has.
        self._ranks.agreed(self._after, self._device)
        self._version[_ARRIVED] = self._version[_BEGUN]
        return self._report(is_delta, time.perf_counter() - begin)

    def _found(self, targets: Targets) -> tuple[list[Landing], list[LocalTensor]]:
        landings = landings_of(targets, self._plan)
        held: list[LocalTensor] = []
        if self._model:
            held = with_memory(local_tensors(self._model, self._merge))
        check_planned(self._plan, held)
        return landings, held

    def _check_targets(self, held: Sequence[LocalTensor]) -> None:
        check_landings(self._plan, self._landings, self._casting)
        if self._delta:
            check_kept(self._plan, self._landings)
        check_memory(self._plan, self._landings, held)

    def _ready(self) -> int:
        """The version of this rank, once its views are of the memory that is used now."""
        if self._memory_now() != self._memory:
            held = local_tensors(self._model, self._merge) if self._model else []
            held += self._fp8.held if self._fp8 is not None else []
            if tuple(map(Shard.of, held)) != self._shards:
                raise InputError(
                    "the model is split otherwise than when the refit was prepared; make a new one"
                )
            self._make_views(held)
        if self._delta and self.version > 0:
            self._changes()  # here all ranks are told if it cannot be made
        return int(self._version[_BEGUN])

    def _check_versions(self, versions: Sequence[int]) -> None:
        numbers = self._ranks.numbers
        for rank, version in zip(numbers, versions, strict=True):
            if version != versions[0]:
                raise InputError(
                    f"rank {numbers[0]} has begun {versions[0]} refits and rank {rank} {version}; "
                    f"every rank has to call each of them"
                )

    def _make_views(self, held: Sequence[LocalTensor]) -> None:
        places: dict[Demand, list[torch.Tensor]] = defaultdict(list)
        for landing in self._landings:
            places[landing.demand].append(landing.out.detach())
        self._copies_again = [
            (other, first) for first, *others in places.values() for other in others
        ]
        self._place = lambda demand: places[demand][0]
        self._held: Sequence[LocalTensor] = held
        self._changed: DeltaRun | None = None
        if self._fp8 is not None:
            self._fp8.look_at(held)
        packing = self._packing(held)
        self.windows = [
            self.exchange.packed(number, packing, self._place)
            for number in range(self.exchange.count)
        ]
        self._memory = self._memory_now()

    def _packing(self, held: Sequence[LocalTensor]) -> Packing:
        quantizing = None if self._fp8 is None else self._fp8.quantizing
        return Packing(self._plan, held, self._casting, self._ranks.count, quantizing)

    def _changes(self) -> DeltaRun:
        """What moves only what changed, once there is something that it could have changed from."""
        if self._changed is None:
            packings = self._packing(self._held), self._packing(self._then)
            self._changed = DeltaRun(
                self.exchange, self._ranks, self._transport, packings, self._place, self._device
            )
        return self._changed

    def _after(self) -> None:
        """Copy to each further place that wants the same, and keep what was sent."""
        for other, first in self._copies_again:
            other.copy_(first)
        if not self._delta:
            return
        if not self._then:
            self._then = [one.copy() for one in self._held]
        elif then := [memory for one in self._then for memory in one.memory]:
            torch._foreach_copy_(then, [memory for one in self._held for memory in one.memory])

    def _memory_now(self) -> list[tuple[object, ...]]:
        tensors = chain(
            *(chunk.parameters() for chunk in self._model),
            (landing.out for landing in self._landings),
            *((one.a, one.b) for one in self._merge),
        )
        return [(one.data_ptr(), one.dtype, one.shape, one.stride()) for one in tensors]

    def _report(self, is_delta: bool, seconds: float) -> RefitReport:
        count, buffers = self.exchange.count, self.exchange.buffer_bytes
        collectives = self._transport.collectives * count
        collectives += count + 4 if is_delta else count - len(self._sure) + 3
        if self._fp8 is not None:
            buffers, collectives = buffers + self._fp8.nbytes, collectives + 2
        if is_delta:
            changes = self._changes()
            sent, received = changes.sent_bytes, changes.received_bytes
            buffers += changes.message_bytes
        else:
            sent = sum(window.send.nbytes for window in self.windows)
            received = sum(window.receive.nbytes for window in self.windows)
        return RefitReport(
            version=self.version,
            windows=count,
            collectives=collectives,
            is_delta=is_delta,
            sent_bytes=sent,
            received_bytes=received,
            own_bytes=self.exchange.own_bytes,
            buffer_bytes=buffers,
            seconds=seconds,
        )


def _device_of(
    held: Sequence[LocalTensor], landings: Sequence[Landing], ranks: Ranks
) -> torch.device:
    tensors = [one.data for one in held] + [landing.out for landing in landings]
    return tensors[0].device if tensors else ranks.device
