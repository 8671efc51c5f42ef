"""Live Megatron models as Hugging Face tensors, whatever ranks they are split over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Literal

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.agreement import check_same_plan, check_same_settings
from megatron.bridge.exchange.buffer_views import PackedWindow, Packing
from megatron.bridge.exchange.demand import Demand, Wanted, whole_tensors
from megatron.bridge.exchange.low_rank import LowRank
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.exchange.route import Routes
from megatron.bridge.exchange.transport import transport_between
from megatron.bridge.exchange.window_run import Exchange
from megatron.bridge.exchange.windows import WINDOW_BYTES, check_window_bytes
from megatron.bridge.live.conversion_tasks import ConversionTask
from megatron.bridge.live.local_tensors import (
    LiveTensors,
    LocalTensor,
    check_planned,
    local_tensors,
)
from megatron.bridge.live.task_values import holding_their_values, made_of
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import read_hf
from megatron.bridge.progress import Progress
from megatron.bridge.runtime.parallel import is_split, ranks_of_model, together_if_split
from megatron.bridge.tensors.boxes import box_shape, full_box
from megatron.bridge.tensors.torch_views import as_torch
from megatron.bridge.text.quoting import quoted

type Receivers = int | Literal["all", "spread"]


@dataclass(frozen=True)
class Export:
    """Which Hugging Face tensors of a model are given, and to whom.

    Attributes:
        plan: of the model.
        casting: of values that the plan's dtypes do not hold.
        to: "all" gives every tensor to every rank, a number to that rank alone, "spread" each to
            one of the ranks, about as many bytes to each.
        window_bytes: that a rank sends, and receives, at a time.
        merge: adapters of this rank's weights, whose products are added to them.
    """

    plan: ConversionPlan
    casting: Casting
    to: Receivers = "all"
    window_bytes: int = WINDOW_BYTES
    merge: Sequence[LowRank] = ()

    def __post_init__(self) -> None:
        is_rank = type(self.to) is int and 0 <= self.to < ranks_of_model().count
        if self.to not in ("all", "spread") and not is_rank:
            raise InputError(
                f"to is {quoted(self.to)}; expected 'all', 'spread' or a rank from 0 to "
                f"{ranks_of_model().count - 1}"
            )
        check_window_bytes(self.window_bytes)

    def tensors(
        self,
        model: Sequence[torch.nn.Module],
        tasks: Iterable[ConversionTask] | None,
        show: Callable[[], AbstractContextManager[Progress]],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that this rank is given.

        Args:
            model: the chunks of this rank.
            tasks: of the model, each with the value of its parameter; only tensors that their
                parameters make are given. None for the whole model.
            show: is entered while tensors are given.

        Yields:
            Name and tensor, in the order of the files, on the model's device.

        Raises:
            PlanError: the model and the plan do not have the same tensors.
            InputError: the tasks have only some of the parameters that make a tensor, a
                `param_weight` is not of its parameter's shape, or another rank cannot go on.
            InexactCast: see `casting`.
        """
        with ExitStack() as values:
            if is_split():
                self._check_alike(of_tasks=tasks is not None)
            # What is found keeps views of what the parameters hold now.
            with ExitStack() as of_tasks:

                def prepared() -> tuple[list[torch.nn.Parameter] | None, list[LocalTensor]]:
                    parameters = None
                    if tasks is not None:
                        parameters = of_tasks.enter_context(holding_their_values(list(tasks)))
                    held = local_tensors(model, self.merge)
                    check_planned(self.plan, held)
                    return parameters, held

                if tasks is None:
                    parameters, held = together_if_split(prepared)
                else:
                    parameters, held = ranks_of_model().together(prepared)
                if parameters is None:
                    names = [name for name in self.plan.hf if name not in self.plan.carried]
                else:
                    names = made_of(parameters, self.plan, held, ranks_of_model())
            given = self._alone(names, held) if self._is_whole(held) else self._of_all(names, held)
            progress = values.enter_context(show())
            own = self._receiver_of(names)
            progress.start("export", sum(self.plan.hf[name].nbytes for name in own))
            for name, tensor in given:
                progress.advance(self.plan.hf[name].nbytes)
                yield name, tensor

    def _check_alike(self, *, of_tasks: bool) -> None:
        ranks = ranks_of_model()
        check_same_plan(ranks, self.plan)
        check_same_settings(
            ranks,
            {
                "window_bytes": self.window_bytes,
                "round": self.casting.rounds,
                "conversion_tasks": "some" if of_tasks else None,
            },
        )

    def _is_whole(self, held: Sequence[LocalTensor]) -> bool:
        """Whether each rank holds the whole model, so that no other need be asked."""
        try:
            Roster.alone(held).check_held(self.plan.megatron)
        except PlanError:
            if ranks_of_model().count == 1:
                raise
            return False
        return self.to == "all" and not self.merge

    @torch.no_grad()
    def _alone(
        self, names: Iterable[str], held: Sequence[LocalTensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        source = LiveTensors(held)
        for name in names:
            box = full_box(self.plan.hf[name].shape)
            yield name, as_torch(read_hf(self.plan, name, box, source, self.casting))

    def _receiver_of(self, names: Sequence[str]) -> list[str]:
        """The tensors that this rank is given."""
        own = ranks_of_model().index
        if self.to == "all":
            return list(names)
        if self.to != "spread":
            return list(names) if self.to == own else []
        given = [0] * ranks_of_model().count
        found = []
        for name in names:
            rank = given.index(min(given))
            given[rank] += self.plan.hf[name].nbytes
            if rank == own:
                found.append(name)
        return found

    def _of_all(
        self, names: Sequence[str], held: Sequence[LocalTensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        ranks, device = ranks_of_model(), held[0].data.device
        roster = Roster.of(ranks, held)
        wanted = Wanted.of(ranks, whole_tensors(self.plan, self._receiver_of(names)))
        packing = Packing(self.plan, held, self.casting, ranks.count)
        routes = Routes(self.plan, roster, wanted)
        exchange = Exchange(routes, ranks, transport_between(ranks), self.window_bytes, device)
        made: dict[Demand, torch.Tensor] = {}

        def place(demand: Demand) -> torch.Tensor:
            if demand not in made:
                dtype = torch_dtype(self.plan.hf[demand.name].dtype)
                made[demand] = torch.empty(box_shape(demand.box), dtype=dtype, device=device)
            return made[demand]

        def windows() -> Iterator[PackedWindow]:
            return (exchange.packed(one, packing, place) for one in range(exchange.count))

        for number in exchange.run(windows()):
            for name in exchange.complete_in(number):
                demand = Demand(name, full_box(self.plan.hf[name].shape))
                if demand in made:
                    yield name, made.pop(demand)
