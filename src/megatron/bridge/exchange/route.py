"""Who sends what to whom: the plan between what ranks hold and what ranks want.

    box that is held  --copies of the plan-->  Hugging Face box  --intersect-->  box that is wanted

Both ends work this out for themselves, from the same roster and the same demands, and come to the
same list: nothing is asked of anybody while bytes move.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.demand import Demand, Wanted, source_of
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.tensors.box_pairs import axis_pairs, hf_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, Shape, box_shape, relative, volume
from megatron.bridge.text.quoting import quoted


@dataclass(frozen=True, eq=False)
class Move:
    """A box of a Hugging Face tensor that a rank sends to others, or receives from one.

    Of experts that follow one another it is a single box, whatever memory each of them is in.

    Attributes:
        box: of the tensor.
        demand: the wanted box that this is a part of.
        copy: of the plan, how the sender holds it.
        peers: the ranks at the other end, in ascending order.
    """

    box: Box
    demand: Demand
    copy: Copy
    peers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the tensor that is wanted."""
        return self.demand.name

    @cached_property
    def shape(self) -> Shape:
        """Of the box."""
        return box_shape(self.box)

    @cached_property
    def within(self) -> Box:
        """The box in coordinates of the demand's."""
        return relative(self.box, self.demand.box)

    @cached_property
    def held_axes(self) -> tuple[int, ...]:
        """The axes of the box in the order in which its sender holds them."""
        return tuple(axis for _, axis in axis_pairs(self.copy))


type MovesByName = Mapping[str, Sequence[Move]]
"""The moves of each tensor, in an order that is the same at both ends."""


class Moves(NamedTuple):
    """What one rank has to do with.

    Attributes:
        sent: to others.
        received: from others.
        own: what it both holds and wants, of itself.
    """

    sent: MovesByName
    received: MovesByName
    own: MovesByName


class Holding(NamedTuple):
    """A part of a tensor that ranks hold.

    Attributes:
        copy: of the plan, how they hold it.
        held: the box of the Megatron tensor that they hold, in one memory or in several.
        holders: the ranks, in ascending order.
    """

    copy: Copy
    held: Box
    holders: tuple[int, ...]


def holdings(plan: ConversionPlan, roster: Roster) -> dict[str, list[tuple[Box, Holding]]]:
    """What is held of each Hugging Face tensor, by the box of it."""
    found: dict[str, list[tuple[Box, Holding]]] = defaultdict(list)
    for key, boxes in roster.holders.items():
        for held, ranks in boxes.items():
            for shared, copy in plan.joined_copies_to(key, held):
                whole = shared == copy.megatron_box
                box = copy.hf_box if whole else hf_part(copy, shared)
                found[copy.hf_name].append((box, Holding(copy, held, ranks)))
    return dict(found)


@dataclass(frozen=True)
class Affinity:
    """Which of several ranks that hold the same sends it.

    The receiver itself, if it is one of them; else one of its node; else any, chosen so that the
    work is spread: a tensor's number and the receiver's choose.

    Attributes:
        ranks_per_node: consecutive ranks that share a node; None where that is not known.
    """

    ranks_per_node: int | None = None

    def check(self) -> None:
        """Raise InputError for what is no number of ranks."""
        given = self.ranks_per_node
        if given is not None and (type(given) is not int or given < 1):
            raise InputError(f"ranks_per_node is {quoted(given)}; expected a whole number from 1")

    def sender(self, holders: tuple[int, ...], receiver: int, number: int) -> int:
        """The rank that sends to `receiver` what `holders` hold.

        Args:
            holders: the ranks, in ascending order.
            receiver: the rank that wants it.
            number: of the tensor, to spread the work by.
        """
        if receiver in holders:
            return receiver
        if (per_node := self.ranks_per_node) is not None:
            near = tuple(one for one in holders if one // per_node == receiver // per_node)
            holders = near or holders
        return holders[(number + receiver) % len(holders)]


class Transfer(NamedTuple):
    """A box of a Hugging Face tensor, from the ranks that hold it to those that want it.

    Attributes:
        box: of the tensor.
        demand: the wanted box that this is a part of.
        holding: what the ranks hold that this is a part of.
        senders: for each receiver the rank that sends to it, itself where it holds the box.
        receivers: the ranks that want it, in ascending order.
    """

    box: Box
    demand: Demand
    holding: Holding
    senders: tuple[int, ...]
    receivers: tuple[int, ...]


class Routes:
    """All moves between ranks, asked for rank by rank or tensor by tensor.

    Args:
        plan: of the model.
        held: what the ranks hold.
        wanted: what the ranks want.
        affinity: who sends.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        held: Roster,
        wanted: Wanted,
        affinity: Affinity = Affinity(),
    ) -> None:
        self.plan, self.held, self.wanted, self.affinity = plan, held, wanted, affinity
        self.names = wanted.names(plan)
        self._number = {name: number for number, name in enumerate(plan.hf)}

    def check(self) -> None:
        """Refuse ranks that do not hold the model, or want what it cannot give.

        Raises:
            PlanError: with each fault.
        """
        self.wanted.check(self.plan)
        self.held.check_held(self.plan.megatron)

    def of(self, rank: int) -> Moves:
        """What a rank sends, receives and has itself.

        Raises:
            PlanError: it would not receive all that it wants.
        """
        sent: dict[str, list[Move]] = {}
        received: dict[str, list[Move]] = {}
        own: dict[str, list[Move]] = {}
        wanted: dict[str, list[Demand]] = defaultdict(list)
        for demand in self.wanted.by_rank[rank]:
            wanted[demand.name].append(demand)
        for name in self.names:
            for part in sorted(self._parts_held_by(rank, name), key=_Part.place):
                receivers = self.wanted.ranks_of[part.demand]
                senders = self._senders(name, part.holding.holders, receivers)
                pairs = zip(senders, receivers, strict=True)
                peers = tuple(to for sender, to in pairs if sender == rank != to)
                if peers:
                    sent.setdefault(name, []).append(part.move(peers))
            for part in sorted(self._parts_of(wanted.get(name, ()), rank), key=_Part.place):
                (sender,) = self._senders(name, part.holding.holders, (rank,))
                side = own if sender == rank else received
                side.setdefault(name, []).append(part.move((sender,)))
        return Moves(sent, received, own)

    def transfers(self, name: str) -> list[Transfer]:
        """All that moves of a tensor.

        Raises:
            PlanError: a rank would not receive all that it wants.
        """
        ends = cache(lambda holders, receivers: self._senders(name, holders, receivers))
        found = []
        for demand in self._demands_of[name]:
            receivers = self.wanted.ranks_of[demand]
            for part in self._parts_of([demand], receivers[0]):
                senders = ends(part.holding.holders, receivers)
                found.append(Transfer(*part, senders, receivers))
        return found

    def holdings_of(self, name: str) -> Sequence[tuple[Box, Holding]]:
        """What is held of a tensor, box by box."""
        return self._holdings.get(source_of(self.plan, name), ())

    @property
    def places(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor ranks that hold a part of it, to tell from where it comes."""
        return {
            name: next((held.holders for _, held in self.holdings_of(name)), ())
            for name in self.names
        }

    def _senders(
        self, name: str, holders: tuple[int, ...], receivers: tuple[int, ...]
    ) -> tuple[int, ...]:
        """For each receiver of a part of a tensor the rank that sends it."""
        number = self._number[source_of(self.plan, name)]
        return tuple(self.affinity.sender(holders, one, number) for one in receivers)

    def _parts_held_by(self, rank: int, name: str) -> Iterator["_Part"]:
        for held, holding in self.holdings_of(name):
            if rank in holding.holders:
                for box, demand in self._demands[name].overlapping(held):
                    yield _Part(box, demand, holding)

    def _parts_of(self, demands: Iterable[Demand], receiver: int) -> Iterator["_Part"]:
        for demand in demands:
            arrived = 0
            held = self._held.get(source_of(self.plan, demand.name), _NOTHING)
            for box, holding in held.overlapping(demand.box):
                arrived += volume(box)
                yield _Part(box, demand, holding)
            if arrived != volume(demand.box):
                raise PlanError(
                    [f"{demand.name}: {arrived} of the {volume(demand.box)} values of it arrive"],
                    heading=f"rank {self.wanted.number(receiver)} would not receive what it wants",
                )

    @cached_property
    def _demands_of(self) -> dict[str, list[Demand]]:
        found: dict[str, list[Demand]] = defaultdict(list)
        for demand in self.wanted.ranks_of:
            found[demand.name].append(demand)
        return found

    @cached_property
    def _demands(self) -> dict[str, BoxIndex[Demand]]:
        return {
            name: BoxIndex((demand.box, demand) for demand in demands)
            for name, demands in self._demands_of.items()
        }

    @cached_property
    def _holdings(self) -> dict[str, list[tuple[Box, Holding]]]:
        return holdings(self.plan, self.held)

    @cached_property
    def _held(self) -> dict[str, BoxIndex[Holding]]:
        return {name: BoxIndex(boxes) for name, boxes in self._holdings.items()}


_NOTHING: BoxIndex[Holding] = BoxIndex(())


class _Part(NamedTuple):
    """A part of a demand that the same ranks hold."""

    box: Box
    demand: Demand
    holding: Holding

    def place(self) -> tuple[Box, Box]:
        """Among those of a tensor, the same at both ends."""
        return self.demand.box, self.box

    def move(self, peers: tuple[int, ...]) -> Move:
        """As one end sees it."""
        return Move(self.box, self.demand, self.holding.copy, peers)
