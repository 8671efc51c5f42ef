"""The processes that share a conversion, as torchrun starts them.

    with Processes.from_environment() as processes:
        settings = processes.first_does(read_settings)         # process 0 does it, all get it
        processes.together(lambda: convert(processes.share(sizes)))

They talk through the key-value store that torchrun serves, or process 0 where nobody else does; no
process group is made. All of them call the same methods in the same order. A wait lasts as long as
the work does. An error of one ends all: the others raise ProcessFailed at their next `check` or
wait. One that ends without a word is missed, because every process counts up a key while it lives.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megatron.bridge.errors import BridgeError, InputError

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT = timedelta(minutes=10)
"""How long the others may take to start."""

_BEAT_SECONDS = 0.5
_MISSED_BEATS = 60
"""So many looks at a process that does not count on, and it is lost. Looks and not seconds: all
may have been suspended."""

_POLL_SECONDS = 0.02
_GATHER_SECONDS = 3.0
"""How long process 0 waits for what the others have to say of a failure."""

_LEAVE_SECONDS = 30.0
_MESSAGE_LENGTH = 4000
_sessions = itertools.count()


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


_LOST_STORE = Failure(0, "Lost", "it ended, or torchrun did: there is no connection any more", 2)


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
        return _Team(_store(rank, size), rank, size)

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


def _store(rank: int, size: int) -> Store:
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, *_ = next(rendezvous("env://", rank, size, timeout=_CONNECT))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"process {rank} cannot reach the others: {error}; start them with torchrun"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"megatron-bridge/{attempt}/{next(_sessions)}", store)


class _Team(Processes):
    """One of several processes. The store raises RuntimeError when its server is gone."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._others = [other for other in range(size) if other != rank]
        self._step = 0
        self._told = False
        self._failed = threading.Event()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, daemon=True)
        self._watch.start()

    def check(self) -> None:
        if self._failed.is_set():
            if self.is_first:  # its error names all that failed
                self.all_stopped(_GATHER_SECONDS)
            raise ProcessFailed(self._failures())

    def first_does[T](self, function: Callable[[], T]) -> T:
        key = f"{self._next_step()}/result"
        if self.is_first:
            with self._telling():
                result = function()
                with self._connected():
                    self._store.set(key, json.dumps(result))
            return result
        self._wait_until(lambda: self._store.check([key]))
        with self._connected():
            return json.loads(self._store.get(key))

    def together[T](self, function: Callable[[], T]) -> T:
        key = f"{self._next_step()}/done"
        with self._telling():
            result = function()
            with self._connected():
                self._store.add(key, 1)
        self._wait_until(lambda: self._store.add(key, 0) == self.size)
        return result

    def fail(self, error: BaseException) -> None:
        if self._told:
            return
        self._told = True
        with contextlib.suppress(RuntimeError):
            if not isinstance(error, ProcessFailed):
                self._post(Failure.of(self.rank, error))
            self._store.set(f"stopped/{self.rank}", "")

    def all_stopped(self, seconds: float) -> bool:
        return self._waited([f"stopped/{rank}" for rank in self._others], seconds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.fail(error)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
        if not isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._waited([f"left/{rank}" for rank in self._others], _LEAVE_SECONDS)
        self._ended.set()
        self._watch.join()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _next_step(self) -> int:
        self._step += 1
        return self._step

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        pause = _POLL_SECONDS
        while True:
            with self._connected():
                if reached():
                    return
            self.check()
            time.sleep(pause)
            pause = min(1.2 * pause, _BEAT_SECONDS)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            raise ProcessFailed([_LOST_STORE]) from None

    def _waited(self, keys: Sequence[str], seconds: float) -> bool:
        end = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while not (there := self._store.check(list(keys))) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            return there
        return False

    def _post(self, failure: Failure) -> None:
        self._store.set(f"failed/{failure.rank}", json.dumps(asdict(failure)))
        self._store.add("failures", 1)

    def _failures(self) -> list[Failure]:
        found = []
        with contextlib.suppress(RuntimeError):
            for rank in range(self.size):
                if self._store.check([key := f"failed/{rank}"]):
                    found.append(Failure(**json.loads(self._store.get(key))))
        return found or [_LOST_STORE]

    def _keep_watch(self) -> None:
        """Count up this process's key, and look at the failures and at the others' keys."""
        watched = dict.fromkeys(self._others if self.is_first else [0], (0, 0))
        try:
            while not self._ended.wait(_BEAT_SECONDS):
                self._store.add(f"alive/{self.rank}", 1)
                if self._store.add("failures", 0):
                    self._failed.set()
                for rank, (beat, missed) in watched.items():
                    now = self._store.add(f"alive/{rank}", 0)
                    missed = missed + 1 if now == beat and beat else 0
                    watched[rank] = (now, missed)
                    if missed == _MISSED_BEATS and not self._store.check([f"left/{rank}"]):
                        self._post(Failure(rank, "Lost", "it gives no sign of life any more", 2))
        except RuntimeError:
            self._failed.set()
