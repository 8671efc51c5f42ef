"""The processes that share a conversion, as torchrun starts them.

    with Processes.from_environment() as processes:
        settings = processes.run_on_first(read_settings)       # all get what it returns
        processes.run_on_all(lambda: convert(processes.own_files(sizes)))

All of them call the same methods in the same order. After an error of one the others stop soon, and
raise ProcessFailed, which names it. If one is killed, torchrun ends the others; where nothing
supervises them, they end at their next common step.
"""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.errors import BridgeError, InputError

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT = timedelta(minutes=10)
"""How long the others may take to start."""

_STEP = timedelta(days=1)
"""How long one waits for the others' share of the work. One that ends is noticed at once."""

_UNKNOWN = "another process ended without saying why; the report of torchrun names it"

_CHECK_SECONDS = 0.5
_MESSAGE_LENGTH = 4000
_sessions = itertools.count()


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of one process.

    Attributes:
        kind: the name of its class.
        message: its text.
        exit_status: what the command line returns for it.
    """

    rank: int
    kind: str
    message: str
    exit_status: int

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Self:
        """Describe an error."""
        status = getattr(error, "exit_status", 2 if isinstance(error, OSError) else 70)
        message = str(error)[:_MESSAGE_LENGTH] or type(error).__name__
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
            message = f"it was ended, with status {status}"
        if isinstance(error, KeyboardInterrupt):
            status, message = 130, "interrupted"
        return cls(rank, type(error).__name__, message, status)


class ProcessFailed(BridgeError):
    """Other processes of this conversion failed, so this one stopped too.

    `failures` is empty if one ended without a word, or while it is not known what happened.
    """

    def __init__(self, failures: Sequence[Failure] = ()) -> None:
        super().__init__()
        self.name(failures)

    def name(self, failures: Sequence[Failure]) -> None:
        """Say which processes failed, and why."""
        self.failures = tuple(failures)
        self.exit_status = failures[0].exit_status if failures else 2

    def __str__(self) -> str:
        lines = [f"process {failure.rank} failed: {failure.message}" for failure in self.failures]
        return "\n".join(lines) or _UNKNOWN


class Processes:
    """A process that converts alone, and what several have in common."""

    rank = 0
    size = 1

    @staticmethod
    def from_environment() -> Processes:
        """The processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        Without WORLD_SIZE, or with 1, this process is alone.

        Raises:
            InputError: they make no sense, or the others cannot be reached.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Processes()
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        if not rank < size:
            raise InputError(f"RANK is {rank}, but WORLD_SIZE {size}; start it with torchrun")
        return _ProcessGroup(rank, size)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which does what only one can do."""
        return self.rank == 0

    def own_files(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The files of this process, of files with these sizes: all get about as many bytes."""
        loads = [(0, rank) for rank in range(self.size)]
        owner = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            load, rank = heapq.heappop(loads)
            owner[name] = rank
            heapq.heappush(loads, (load + sizes[name], rank))
        return tuple(name for name in sizes if owner[name] == self.rank)

    def check(self) -> None:
        """Raise ProcessFailed if another process has failed. Cheap; for every piece."""

    def run_on_first[T](self, function: Callable[[], T]) -> T:
        """Return in all processes what `function` returns in process 0. Raises ProcessFailed."""
        return function()

    def run_on_all[T](self, function: Callable[[], T]) -> T:
        """Call `function`, then wait until all have. Raises ProcessFailed."""
        return function()

    def stop(self, error: BaseException) -> bool:
        """Tell the others of an error, and wait until all have stopped.

        Returns:
            Whether all have; not if one of them has ended without a word. A ProcessFailed then
            names the others' errors.
        """
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


class _ProcessGroup(Processes):
    """One of several processes: a gloo group, and a key that says that one has failed.

    The group is used for one step after the other: each process gives its result or its error. The
    step in which there was an error is the last one.
    """

    def __init__(self, rank: int, size: int) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self._group: Any = None
        """None for the default one."""
        try:
            self._store = _connect(rank, size)
            if dist.is_initialized():  # the program's own, of whatever kind
                self._group = dist.new_group(backend="gloo", timeout=_STEP)
            else:
                dist.init_process_group(
                    "gloo", store=self._store, rank=rank, world_size=size, timeout=_STEP
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(
                f"process {rank} cannot reach the others: {error}; start them with torchrun"
            ) from error
        self._connected = True
        self._failures: list[Failure] | None = None
        self._next_check = 0.0

    def check(self) -> None:
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _CHECK_SECONDS
        try:
            failed = self._store.check(["failed"])
        except RuntimeError:  # who serves the store has ended
            failed = True
        if failed:
            raise ProcessFailed

    def run_on_first[T](self, function: Callable[[], T]) -> T:
        return self._run(function if self.is_first else _nothing)[0]

    def run_on_all[T](self, function: Callable[[], T]) -> T:
        return self._run(function)[self.rank]

    def stop(self, error: BaseException) -> bool:
        if self._connected and self._failures is None:
            own = None if isinstance(error, ProcessFailed) else Failure.of(self.rank, error)
            with suppress(RuntimeError):
                self._store.set("failed", "")
            with suppress(ProcessFailed):
                self._step(None, own)
        if isinstance(error, ProcessFailed):
            error.name(self._failures or ())
        return self._connected

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import torch.distributed as dist

        if error is not None:
            self.stop(error)
        with suppress(RuntimeError):
            if self._connected:
                dist.barrier(self._group)
            dist.destroy_process_group(self._group)

    def _run(self, function: Callable[[], Any]) -> list[Any]:
        try:
            result = function()
        except BaseException as error:
            self.stop(error)
            raise
        return self._step(result, None)

    def _step(self, result: object, failure: Failure | None) -> list[Any]:
        """The results of all processes. Raises ProcessFailed with the errors of the others."""
        import torch.distributed as dist

        if not self._connected or self._failures is not None:
            raise ProcessFailed(self._failures or ())
        outcomes: list[Any] = [None] * self.size
        connected, self._connected = self._connected, False
        try:
            dist.all_gather_object(outcomes, (result, failure), group=self._group)
        except RuntimeError:  # one has ended
            raise ProcessFailed from None
        self._connected = connected
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            self._failures = failures
            raise ProcessFailed(failures)
        return [result for result, _ in outcomes]


def _connect(rank: int, size: int) -> Store:
    """The store that all processes share: torchrun's, or that of process 0."""
    from torch.distributed import PrefixStore, rendezvous

    store, *_ = next(rendezvous("env://", rank, size, timeout=_CONNECT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"megatron-bridge/{attempt}/{next(_sessions)}", store)


def _nothing() -> Any:
    return None


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{variable} should be a number, found {text!r}; start it with torchrun")
    return int(text)
