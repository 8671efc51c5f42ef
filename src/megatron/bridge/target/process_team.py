"""How processes that share a conversion hear of each other.

They talk through the key-value store that torchrun serves, or process 0 where nobody else does; no
process group is made. A process that ends without a word is missed: every process counts up a key
while it lives, the first looks at those of the others, and they at that of the first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from megatron.bridge.errors import InputError
from megatron.bridge.target.processes import Failure, Processes, ProcessFailed

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
_sessions = itertools.count()


_LOST_STORE = Failure(0, "Lost", "it ended, or torchrun did: there is no connection any more", 2)


def connect(rank: int, size: int) -> Store:
    """The store that all processes share. Raises InputError if it cannot be reached."""
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, *_ = next(rendezvous("env://", rank, size, timeout=_CONNECT))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"process {rank} cannot reach the others: {error}; start them with torchrun"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"megatron-bridge/{attempt}/{next(_sessions)}", store)


class ProcessTeam(Processes):
    """One of several processes. The store raises RuntimeError when its server is gone."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._others = [other for other in range(size) if other != rank]
        self._step = 0
        self._told = False
        self._failed = threading.Event()
        self._ended = threading.Event()
        self._beat()
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
        # The first has the last word, on the target; then it stays, as it may serve the store.
        patience = 0.0 if isinstance(error, (KeyboardInterrupt, SystemExit)) else _LEAVE_SECONDS
        if self.is_first:
            self._leave()
            self._waited([f"left/{rank}" for rank in self._others], patience)
            self._stop_watch()
        else:
            self._waited(["left/0"], patience)
            self._stop_watch()
            self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")

    def _stop_watch(self) -> None:
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

    def _beat(self) -> None:
        self._store.add(f"alive/{self.rank}", 1)

    def _keep_watch(self) -> None:
        """Count up this process's key, and look at the failures and at the others' keys."""
        watched = dict.fromkeys(self._others if self.is_first else [0], (0, 0))
        try:
            while not self._ended.wait(_BEAT_SECONDS):
                self._beat()
                if self._store.add("failures", 0):
                    self._failed.set()
                for rank, (beat, missed) in watched.items():
                    now = self._store.add(f"alive/{rank}", 0)
                    missed = missed + 1 if now == beat and beat else 0
                    watched[rank] = (now, missed)
                    if missed == _MISSED_BEATS and not self._store.check([f"left/{rank}"]):
                        self._post(Failure(rank, "Lost", "it gives no sign of life any more", 2))
                        self._store.set(f"left/{rank}", "")
        except RuntimeError:
            self._failed.set()
