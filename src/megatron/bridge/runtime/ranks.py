"""Ranks that go on together, or not at all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from time import monotonic, sleep
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError

_THERE = "megatron-bridge/there/{}"
_ANSWER_SECONDS = 5.0
"""That a rank has to hear that another is gone, and to say so."""


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
            with self.naming_lost():
                dist.all_gather_object(told, (outcome, message), self.group)
        if error is not None:
            raise error
        for rank, (_, refusal) in enumerate(told):
            if refusal is not None:
                raise InputError(f"rank {rank} cannot go on: {refusal}")
        return [one for one, _ in told]

    def all_once[T](self, own: T) -> list[T]:
        """What every rank gives, in the order of the ranks; what is equal is told and kept once.

        Args:
            own: of this rank; two that print alike are equal.

        Raises:
            InputError: as of `all_of`.
        """
        digests = self.all_of(lambda: sha256(repr(own).encode()).digest())
        tells = digests.index(digests[self.index]) == self.index
        told = self.all_of(lambda: own if tells else None)
        return [cast("T", told[digests.index(digest)]) for digest in digests]

    def first(self, step: Callable[[], None]) -> None:
        """One rank takes the step, and the others wait for it; raises as `all_of`."""
        self.together(lambda: step() if self.is_first else None)

    def told[T](self, step: Callable[[], T]) -> T:
        """What one rank's `step` returns, on every rank; raises as `all_of`."""
        found: list[T] = []
        self.first(lambda: found.append(step()))
        return next(one for own in self.all_of(lambda: found) for one in own)

    def agreed[T](self, step: Callable[[], T], device: torch.device) -> T:
        """What `step` returns here, once no rank's has raised; one small collective.

        Args:
            step: of this rank.
            device: that the group's collectives take tensors of.

        Raises:
            Exception: as of `all_of`.
        """
        own: list[T] = []
        error: Exception | None = None
        try:
            own.append(step())
        except Exception as raised:  # noqa: BLE001 - the other ranks wait to be told
            error = raised
        if any(self.largest([error is not None], device)):

            def again() -> None:
                if error is not None:
                    raise error

            self.together(again)
        return own[0]

    def largest(self, own: Sequence[int], device: torch.device) -> list[int]:
        """Of a list that every rank has, the greatest number at each place.

        Args:
            own: of this rank, as long as those of the others.
            device: as of `agreed`.
        """
        numbers = torch.tensor(own, dtype=torch.int64, device=device)
        if dist.is_initialized():
            with self.naming_lost():
                dist.all_reduce(numbers, dist.ReduceOp.MAX, self.group)
        return [int(number) for number in numbers.tolist()]

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Where torch says that a connection broke, say which rank is gone.

        Raises:
            InputError: with the ranks that do not answer within some seconds.
        """
        try:
            yield
        except RuntimeError as error:
            lost = self._lost()
            if not lost:
                raise
            names = ", ".join(map(str, lost))
            raise InputError(
                f"rank {names} is gone: look for its own message, or for what killed it. The last "
                f"word from torch: {_first_line(error)}"
            ) from error

    def _lost(self) -> list[int]:
        """The ranks of the job that do not say within some seconds that they are there."""
        try:
            store = dist.distributed_c10d._get_default_store()
            own = dist.get_rank()
            store.set(_THERE.format(own), "")
            end = monotonic() + _ANSWER_SECONDS
            missing = [rank for rank in dist.get_process_group_ranks(self.group) if rank != own]
            while missing and monotonic() < end:
                missing = [rank for rank in missing if not store.check([_THERE.format(rank)])]
                sleep(0.05)
        except RuntimeError:
            return []  # who serves the store is gone: torch's own words are all there is
        return missing

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


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:200]
