"""What each rank wants of a model, in the coordinates of Hugging Face tensors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from megatron.bridge.errors import PlanError
from megatron.bridge.exchange.roster import Telling
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box, format_box, full_box, intersect


class Demand(NamedTuple):
    """A box of a Hugging Face tensor that a rank wants.

    Attributes:
        name: of the tensor.
        box: of it.
    """

    name: str
    box: Box


def whole_tensors(plan: ConversionPlan, names: Iterable[str]) -> list[Demand]:
    """Some tensors of a plan, each of them whole."""
    return [Demand(name, full_box(plan.hf[name].shape)) for name in names]


@dataclass(frozen=True)
class Wanted:
    """What each rank wants.

    Attributes:
        by_rank: the demands of each rank, no two alike, in the order of the ranks. Ranks that want
            the same share one tuple.
        numbers: what each rank is called in messages; empty where that is its place.
    """

    by_rank: tuple[tuple[Demand, ...], ...]
    numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, ranks: Telling, own: Iterable[Demand]) -> Self:
        """What all ranks want, once each has told it.

        Args:
            ranks: all call this.
            own: what this one wants.
        """
        return cls(tuple(ranks.all_once(tuple(dict.fromkeys(own)))), tuple(ranks.numbers))

    def number(self, rank: int) -> int:
        """What a rank is called in messages."""
        return self.numbers[rank] if self.numbers else rank

    def names(self, plan: ConversionPlan) -> list[str]:
        """The tensors that anybody wants something of, in the order of the plan."""
        wanted = {demand.name for demand in self.ranks_of}
        return [name for name in plan.hf if name in wanted]

    def check(self, plan: ConversionPlan) -> None:
        """Refuse what the model cannot give.

        Raises:
            PlanError: with each demand of a tensor that is none, that the model has no values of,
                or of a box that is not within the tensor.
        """
        problems = [
            f"rank {self.number(ranks[0])} wants {demand.name}{format_box(demand.box)}: {problem}"
            for demand, ranks in self.ranks_of.items()
            if (problem := _problem(plan, demand)) is not None
        ]
        if problems:
            raise PlanError(problems, heading="the model cannot give what is wanted of it")

    @cached_property
    def ranks_of(self) -> dict[Demand, tuple[int, ...]]:
        """The ranks that make each demand."""
        ranks: dict[Demand, set[int]] = defaultdict(set)
        for own, of in self.distinct:
            for demand in own:
                ranks[demand].update(of)
        return {demand: tuple(sorted(of)) for demand, of in ranks.items()}

    @property
    def distinct(self) -> Iterator[tuple[tuple[Demand, ...], list[int]]]:
        """What ranks want, and which ones want just that."""
        ranks: dict[int, list[int]] = defaultdict(list)
        for rank, own in enumerate(self.by_rank):
            ranks[id(own)].append(rank)
        return ((self.by_rank[of[0]], of) for of in ranks.values())


def source_of(plan: ConversionPlan, name: str) -> str:
    """The tensor whose values a tensor has: itself, or the one that it must equal."""
    copy_of = plan.equal.get(name)
    return name if copy_of is None else copy_of.name


def _problem(plan: ConversionPlan, demand: Demand) -> str | None:
    spec = plan.hf.get(demand.name)
    if spec is None:
        return "the model has no such tensor"
    if demand.name in plan.carried and demand.name not in plan.equal:
        return f"the Megatron model has no values of it ({plan.carried[demand.name]})"
    whole = full_box(spec.shape)
    if len(demand.box) != len(whole) or intersect(demand.box, whole) != demand.box:
        return f"its shape is {spec.shape}"
    return None
