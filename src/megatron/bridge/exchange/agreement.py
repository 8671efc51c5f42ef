"""What all ranks have to have alike before anything moves between them."""

from collections.abc import Mapping
from itertools import zip_longest

from megatron.bridge.errors import InputError
from megatron.bridge.exchange.roster import Telling
from megatron.bridge.models.conversion.plan import ConversionPlan


def check_same_settings(ranks: Telling, own: Mapping[str, object]) -> None:
    """Refuse settings of which ranks have different ones.

    Args:
        ranks: all call this.
        own: of this rank, by the names that a caller knows.

    Raises:
        InputError: with the first that differs; on every rank alike.
    """
    first, *others = zip(ranks.numbers, ranks.all_of(lambda: dict(own)), strict=True)
    for rank, settings in others:
        for name, here in first[1].items():
            if settings[name] != here:
                raise InputError(
                    f"rank {first[0]} has {name}={here!r}, rank {rank} {name}={settings[name]!r}; "
                    f"give every rank the same"
                )


def check_same_plan(ranks: Telling, plan: ConversionPlan) -> None:
    """Refuse ranks with different plans of the model.

    Args:
        ranks: all call this.
        plan: of this rank.

    Raises:
        InputError: with the first tensor that differs; on every rank alike.
    """
    own = (*plan.hf.values(), *plan.megatron.values())
    first, *others = zip(ranks.numbers, ranks.all_once(own), strict=True)
    for rank, specs in others:
        if specs == first[1]:
            continue
        difference = next(
            f"rank {first[0]} has {here}, rank {rank} has {there}"
            for here, there in zip_longest(first[1], specs)
            if here != there
        )
        raise InputError(f"the ranks have different plans: {difference}")
