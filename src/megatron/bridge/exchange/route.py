"""Who sends what to whom: the plan between what ranks hold and what ranks want.

    box that is held  --copies of the plan-->  Hugging Face box  --intersect-->  box that is wanted

Both ends work this out for themselves, from the same roster and the same demands, and come to the
same list: nothing is asked of anybody while bytes move.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import PlanError
from megatron.bridge.exchange.demand import Demand, Wanted, source_of
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, volume


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


@dataclass(frozen=True)
class Affinity:
    """Which of several ranks that hold the same sends it.

    The receiver itself, if it is one of them; else one of its node; else any, chosen so that the
    work is spread: a tensor's number and the receiver's choose.

    Attributes:
        ranks_per_node: consecutive ranks that share a node; None where that is not known.
    """

    ranks_per_node: int | None = None

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
        demands: dict[str, list[tuple[Box, tuple[Demand, tuple[int, ...]]]]] = defaultdict(list)
        for demand, ranks in wanted.ranks_of.items():
            demands[source_of(plan, demand.name)].append((demand.box, (demand, ranks)))
        self._demands = {name: BoxIndex(items) for name, items in demands.items()}

    def sends(self, rank: int) -> list[Move]:
        """What a rank sends, to itself too; by receiver, then as the receiver has it."""
        return self._in_order(self._sent_by(rank))

    def receives(self, rank: int) -> list[Move]:
        """What a rank receives, from itself too; by sender, then by tensor and box.

        Raises:
            PlanError: it is not all that the rank wants.
        """
        return self._in_order(self._received_by(rank))

    def holders_of(self, name: str) -> tuple[int, ...]:
        """The ranks that hold the first element of a tensor: where it lies, for a summary."""
        source = source_of(self.plan, name)
        first = tuple((0, 1) for _ in self.plan.hf[source].shape)
        for shared, copy in self.plan.copies_from(source, first):
            for _, _, ranks in self.held.holders(copy.megatron_key, megatron_part(copy, shared)):
                return ranks
        return ()

    def nbytes(self, move: Move) -> int:
        """How many bytes a move has."""
        return volume(move.box) * itemsize(self.plan.hf[move.name].dtype)

    def _in_order(self, moves: Iterator[Move]) -> list[Move]:
        # Of a pair of ranks both ends have the same order.
        return sorted(
            moves,
            key=lambda move: (
                move.sender,
                move.receiver,
                self._number[move.name],
                move.demand.box,
                move.box,
            ),
        )

    def _sent_by(self, rank: int) -> Iterator[Move]:
        seen: set[tuple[str, Box]] = set()
        for shard in self.held.by_rank[rank]:
            if (shard.key, shard.box) in seen:  # one more view of the same part
                continue
            seen.add((shard.key, shard.box))
            holders = next(
                ranks
                for _, held, ranks in self.held.holders(shard.key, shard.box)
                if held == shard.box
            )
            for shared, copy in self.plan.copies_to(shard.key, shard.box):
                if (demands := self._demands.get(copy.hf_name)) is None:
                    continue
                number = self._number[copy.hf_name]
                for box, (demand, ranks) in demands.overlapping(hf_part(copy, shared)):
                    for receiver in ranks:
                        if self._affinity.sender(holders, receiver, number) == rank:
                            yield Move(rank, receiver, box, demand, copy, shard.box)

    def _received_by(self, rank: int) -> Iterator[Move]:
        for demand in self.wanted.by_rank[rank]:
            number = self._number[source_of(self.plan, demand.name)]
            arrived = 0
            source = source_of(self.plan, demand.name)
            for shared, copy in self.plan.copies_from(source, demand.box):
                wanted = megatron_part(copy, shared)
                for part, held, holders in self.held.holders(copy.megatron_key, wanted):
                    box = hf_part(copy, part)
                    arrived += volume(box)
                    sender = self._affinity.sender(holders, rank, number)
                    yield Move(sender, rank, box, demand, copy, held)
            if arrived != volume(demand.box):
                raise PlanError(
                    [f"{demand.name}: {arrived} of the {volume(demand.box)} values of it arrive"],
                    heading=f"rank {rank} would not receive what it wants",
                )
