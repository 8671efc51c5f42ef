"""Ranks that go on together, or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron.bridge.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """The ranks that load or save together.

    Attributes:
        group: their process group, None for all of them.
    """

    group: dist.ProcessGroup | None = None

    def together[T](self, step: Callable[[], T]) -> T:
        """What `step` returns here, once every rank has taken it; raises as `all_of`."""
        own: list[T] = []
        self.all_of(lambda: own.append(step()))
        return own[0]

    def all_of[T](self, step: Callable[[], T]) -> list[T]:
        """What every rank's `step` returns, in the order of the ranks.

        Raises:
            Exception: what `step` raises here; InputError if it raises on another rank.
        """
        outcome, error = None, None
        try:
            outcome = step()
        except Exception as raised:  # noqa: BLE001 - the other ranks wait to be told
            error = raised
        message = None if error is None else str(error) or type(error).__name__
        told: list[Any] = [(outcome, message)]
        if dist.is_initialized():
            told *= self.count
            dist.all_gather_object(told, (outcome, message), self.group)
        if error is not None:
            raise error
        for rank, (_, refusal) in enumerate(told):
            if refusal is not None:
                raise InputError(f"rank {rank} cannot go on: {refusal}")
        return [one for one, _ in told]

    def first(self, step: Callable[[], None]) -> None:
        """One rank takes the step, and the others wait for it; raises as `all_of`."""
        self.together(lambda: step() if self.is_first else None)

    def told[T](self, step: Callable[[], T]) -> T:
        """What one rank's `step` returns, on every rank; raises as `all_of`."""
        found: list[T] = []
        self.first(lambda: found.append(step()))
        return next(one for own in self.all_of(lambda: found) for one in own)

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def index(self) -> int:
        """Which of the ranks this is."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that does what is to be done once."""
        return self.index == 0
