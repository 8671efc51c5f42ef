"""Ranks that go on together, or not at all."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.runtime.lost_ranks import naming_lost, wait_for

_RAISED = -1
"""In the place of a number, of a rank that has none."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that load or save together.

    Attributes:
        group: their process group, None for all of them. It may reach beyond the job's own ranks.

    Raises:
        InputError: this rank is not one of them.
    """

    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        given: object = self.group
        if given is dist.GroupMember.NON_GROUP_MEMBER:
            raise InputError("this rank is not in the process group; call this where it is")

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
            told = self._gathered((outcome, message))
        if error is not None:
            raise error
        for rank, (_, refusal) in zip(self.numbers, told, strict=True):
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
            self._raise(error)
        return own[0]

    def agreed_with_each[T](
        self, step: Callable[[], tuple[T, Sequence[int]]], device: torch.device
    ) -> tuple[T, list[int]]:
        """As `agreed`, and a number that each rank has for this one; one small collective.

        Args:
            step: of this rank; returns also a number from 0 for each rank.
            device: as of `agreed`.

        Raises:
            Exception: as of `all_of`.
        """
        own: list[T] = []
        numbers: Sequence[int] = [_RAISED] * self.count
        error: Exception | None = None
        try:
            found, numbers = step()
            own.append(found)
        except Exception as raised:  # noqa: BLE001 - the other ranks wait to be told
            error = raised
        sent = torch.tensor(numbers, dtype=torch.int64, device=device)
        received = sent.clone()
        if dist.is_initialized():
            group = self.group
            self.done(lambda: dist.all_to_all_single(received, sent, group=group, async_op=True))
        told = [int(number) for number in received.tolist()]
        if _RAISED in told:
            self._raise(error)
        return own[0], told

    def _raise(self, error: Exception | None) -> None:
        """On every rank; `error` is of this one."""

        def again() -> None:
            if error is not None:
                raise error

        self.together(again)

    def largest(self, own: Sequence[int], device: torch.device) -> list[int]:
        """Of a list that every rank has, the greatest number at each place.

        Args:
            own: of this rank, as long as those of the others.
            device: as of `agreed`.
        """
        numbers = torch.tensor(own, dtype=torch.int64, device=device)
        if dist.is_initialized():
            largest = dist.ReduceOp.MAX
            self.done(lambda: dist.all_reduce(numbers, largest, self.group, async_op=True))
        return [int(number) for number in numbers.tolist()]

    def done(self, start: Callable[[], dist.Work | None]) -> None:
        """Begin a collective and wait for it.

        Raises:
            InputError: a rank is gone.
        """
        with naming_lost(self.group):
            wait_for(start(), self.group)

    def _gathered(self, own: object) -> list[Any]:
        """What every rank has, in the order of the ranks; any object that can be pickled."""
        # As torch's own, but that it can be waited for while a rank is gone.
        content = bytearray(pickle.dumps(own))
        size = torch.tensor([len(content)], dtype=torch.int64, device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.count)]
        self.done(lambda: dist.all_gather(sizes, size, self.group, async_op=True))
        most = max(int(one) for one in sizes)
        padded = torch.zeros(most, dtype=torch.uint8, device=self.device)
        padded[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
        all_padded = [torch.empty_like(padded) for _ in sizes]
        self.done(lambda: dist.all_gather(all_padded, padded, self.group, async_op=True))
        return [
            pickle.loads(one[: int(size)].cpu().numpy().tobytes())  # noqa: S301 - of our own job
            for one, size in zip(all_padded, sizes, strict=True)
        ]

    @property
    def device(self) -> torch.device:
        """That the group's collectives take tensors of."""
        if not dist.is_initialized():
            return torch.device("cpu")
        of_cpu = "gloo" in dist.get_backend(self.group) or not torch.cuda.is_available()
        return torch.device("cpu" if of_cpu else "cuda")

    @property
    def numbers(self) -> list[int]:
        """What each is called in messages: its rank among all of the job."""
        return dist.get_process_group_ranks(self.group) if dist.is_initialized() else [0]

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def index(self) -> int:
        """Which of the ranks this is."""
        if not dist.is_initialized():
            return 0
        # torch would look up the rank that this one has in the job.
        return dist.get_rank() if self.group is None else self.group.rank()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that does what is to be done once."""
        return self.index == 0
