"""The processes that share a conversion, as torchrun starts them.

    with Processes.from_environment() as processes:
        settings = processes.first_does(read_settings)         # process 0 does it, all get it
        processes.together(lambda: convert(processes.share(sizes)))

All of them call the same methods in the same order. A wait lasts as long as the work does. An error
of one ends all: the others raise ProcessFailed at their next `check` or wait.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from megatron.bridge.errors import BridgeError, InputError

_MESSAGE_LENGTH = 4000


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of one process: its class and text, and what the command line returns for it."""

    rank: int
    kind: str
    message: str
    exit_status: int

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Self:
        """Describe an error."""
        status = getattr(error, "exit_status", 2 if isinstance(error, OSError) else 70)
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        if isinstance(error, KeyboardInterrupt):
            status = 130
        message = str(error)[:_MESSAGE_LENGTH] or "no more is known"
        return cls(rank, type(error).__name__, message, status)


class ProcessFailed(BridgeError):
    """Other processes of this conversion failed, so this one stopped too."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self.failures = tuple(failures)
        self.exit_status = failures[0].exit_status
        super().__init__("\n".join(f"process {f.rank} failed: {f.message}" for f in failures))


class Processes:
    """A process that converts alone, and what several have in common."""

    rank = 0
    size = 1

    @staticmethod
    def from_environment() -> Processes:
        """As RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say; alone if there is no WORLD_SIZE.

        Raises InputError if they make no sense or the others cannot be reached.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Processes()
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        if not rank < size:
            raise InputError(f"RANK is {rank}, but WORLD_SIZE {size}; start it with torchrun")
        from megatron.bridge.target.process_team import ProcessTeam, connect

        return ProcessTeam(connect(rank, size), rank, size)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which does what only one can do."""
        return self.rank == 0

    def share(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The files of this process, of files with these sizes: all get about as many bytes."""
        loads = [(0, rank) for rank in range(self.size)]
        owner = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            load, rank = heapq.heappop(loads)
            owner[name] = rank
            heapq.heappush(loads, (load + sizes[name], rank))
        return tuple(name for name in sizes if owner[name] == self.rank)

    def check(self) -> None:
        """Raise ProcessFailed if another process failed. Costs nothing; for every piece."""

    def first_does[T](self, function: Callable[[], T]) -> T:
        """What `function` returns in process 0, the only one that calls it: small JSON values."""
        return function()

    def together[T](self, function: Callable[[], T]) -> T:
        """Call `function`, then wait until all have; raise ProcessFailed if one of them failed."""
        return function()

    def fail(self, error: BaseException) -> None:
        """Tell the others, once this process writes no more."""

    def all_stopped(self, seconds: float) -> bool:
        """Whether after a failure all others have called `fail`; waits so long for it."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave together, so that none is ended by torchrun while it still cleans up."""


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{variable} should be a number, found {text!r}; start it with torchrun")
    return int(text)
