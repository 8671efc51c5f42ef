"""Who sends what to whom: the plan between what ranks hold and what ranks want.

    box that is held  --copies of the plan-->  Hugging Face box  --intersect-->  box that is wanted

Both ends work this out for themselves, from the same roster and the same demands, and come to the
same list: nothing is asked of anybody while bytes move.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.demand import Demand, Wanted, source_of
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, volume
from megatron.bridge.text.quoting import quoted


class Move(NamedTuple):
    """A box of a Hugging Face tensor that one rank sends to another, or to itself.

    Attributes:
        sender: a rank that holds it.
        receiver: the rank that wants it.
        box: of the tensor.
        demand: the wanted box that this is a part of.
        copy: of the plan, how the sender holds it.
        held: the box of the Megatron tensor that the sender holds.
    """

    sender: int
    receiver: int
    box: Box
    demand: Demand
    copy: Copy
    held: Box

    @property
    def name(self) -> str:
        """Of the tensor that is wanted."""
        return self.demand.name


class Holding(NamedTuple):
    """A part of a tensor that ranks hold.

    Attributes:
        copy: of the plan, how they hold it.
        held: the box of the Megatron tensor that they hold.
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
            for shared, copy in plan.copies_to(key, held):
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


class Routes:
    """All moves between ranks, asked for rank by rank.

    Args:
        plan: of the model.
        held: what the ranks hold; together the model.
        wanted: what the ranks want.
        affinity: who sends.

    Raises:
        PlanError: the ranks do not hold the model, or it cannot give what is wanted.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        held: Roster,
        wanted: Wanted,
        affinity: Affinity = Affinity(),
    ) -> None:
        wanted.check(plan)
        held.check_held(plan.megatron)
        self.plan, self.held, self.wanted = plan, held, wanted
        self._affinity = affinity
        self._number = {name: number for number, name in enumerate(plan.hf)}
        demands: dict[str, list[tuple[Box, Demand]]] = defaultdict(list)
        for demand in wanted.ranks_of:
            demands[source_of(plan, demand.name)].append((demand.box, demand))
        self._demands = {name: BoxIndex(items) for name, items in demands.items()}

    def sends(self, rank: int) -> list[Move]:
        """What a rank sends, to itself too; by receiver, then as the receiver has it."""
        sent: dict[int, list[Move]] = defaultdict(list)
        # Of a pair of ranks both ends have the same order.
        for part in sorted(self._parts_sent_by(rank), key=self._place):
            copy, held, holders = part.holding
            number = self._number[copy.hf_name]
            for receiver in self.wanted.ranks_of[part.demand]:
                if self._affinity.sender(holders, receiver, number) == rank:
                    move = Move(rank, receiver, part.box, part.demand, copy, held)
                    sent[receiver].append(move)
        return [move for receiver in sorted(sent) for move in sent[receiver]]

    def receives(self, rank: int) -> list[Move]:
        """What a rank receives, from itself too; by sender, then by tensor and box.

        Raises:
            PlanError: it is not all that the rank wants.
        """
        received: dict[int, list[Move]] = defaultdict(list)
        for part in sorted(self._parts_received_by(rank), key=self._place):
            copy, held, holders = part.holding
            sender = self._affinity.sender(holders, rank, self._number[copy.hf_name])
            received[sender].append(Move(sender, rank, part.box, part.demand, copy, held))
        return [move for sender in sorted(received) for move in received[sender]]

    def holders_of(self, name: str) -> tuple[int, ...]:
        """Ranks that hold a part of a tensor, to tell from where it comes."""
        holdings = self._holdings.get(source_of(self.plan, name))
        return holdings[0][1].holders if holdings else ()

    def nbytes(self, move: Move) -> int:
        """How many bytes a move has."""
        return volume(move.box) * itemsize(self.plan.hf[move.name].dtype)

    def _place(self, part: "_Part") -> tuple[int, Box, Box]:
        return self._number[part.demand.name], part.demand.box, part.box

    def _parts_sent_by(self, rank: int) -> Iterator["_Part"]:
        for name, holdings in self._holdings.items():
            if (demands := self._demands.get(name)) is None:
                continue
            for hf_box, holding in holdings:
                if rank in holding.holders:
                    for box, demand in demands.overlapping(hf_box):
                        yield _Part(box, demand, holding)

    def _parts_received_by(self, rank: int) -> Iterator["_Part"]:
        for demand in self.wanted.by_rank[rank]:
            arrived = 0
            for box, holding in self._by_name[source_of(self.plan, demand.name)].overlapping(
                demand.box
            ):
                arrived += volume(box)
                yield _Part(box, demand, holding)
            if arrived != volume(demand.box):
                raise PlanError(
                    [f"{demand.name}: {arrived} of the {volume(demand.box)} values of it arrive"],
                    heading=f"rank {self.wanted.number(rank)} would not receive what it wants",
                )

    @cached_property
    def _holdings(self) -> dict[str, list[tuple[Box, Holding]]]:
        return holdings(self.plan, self.held)

    @cached_property
    def _by_name(self) -> dict[str, BoxIndex[Holding]]:
        return {name: BoxIndex(boxes) for name, boxes in self._holdings.items()}


class _Part(NamedTuple):
    """A part of a demand that the same ranks hold."""

    box: Box
    demand: Demand
    holding: Holding
