"""Ctrl-C and SIGTERM at the end of a run: from the renaming on it is too late for them.

    with done_means_done():                # the function that a person calls
        ...                                # here a signal ends the run as ever
        with uninterrupted():              # the commit
            folder.rename(target)
        ...                                # a result is shown; signals change nothing any more

Whoever is told "interrupted" finds no target, and whoever finds one is told "done". Signals are
handled in the main thread only; in any other, both blocks do nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

type Handler = Callable[[int, FrameType | None], Any] | int

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Held:
    """The handlers that were there before, and the signals that came instead."""

    def __init__(self) -> None:
        self.blocks = 0
        self.breaking_off: tuple[Handler, ...] = (signal.default_int_handler,)
        self.before: dict[signal.Signals, Handler] = {}
        self.came: dict[signal.Signals, None] = {}

    def hold(self) -> None:
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before is not None and number not in self.before:  # None: not ours to put back
                self.before[number] = before
                signal.signal(number, self._note)

    def let_go(self) -> None:
        """Put the handlers back; those of the program itself learn of what came."""
        before = dict(self.before)
        for number, handler in reversed(before.items()):
            signal.signal(number, handler)
        came = list(self.came)
        self.came.clear()
        self.before.clear()
        for number in came:
            # What only breaks off what runs comes too late: that is done.
            if before[number] not in self.breaking_off:
                signal.raise_signal(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.came[signal.Signals(number)] = None


_held = _Held()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back inside the block, and up to the end of the outermost one.

    There they are dropped, but for a handler that the program has set (or that ends the process),
    which is called then.
    """
    with done_means_done():
        if _in_main_thread():
            _held.hold()
        yield


@contextmanager
def done_means_done() -> Iterator[None]:
    """Once `uninterrupted` was entered inside the block, signals stay held up to its end.

    Also a decorator.
    """
    if not _in_main_thread():
        yield
        return
    _held.blocks += 1
    try:
        yield
    finally:
        _held.blocks -= 1
        if not _held.blocks:
            _held.let_go()


@contextmanager
def orderly_end(leave: Handler, *, for_good: bool) -> Iterator[None]:
    """Let SIGTERM call `leave` inside the block, for a program of one command.

    Args:
        leave: the handler; it raises.
        for_good: whether the process ends with the block; what was done in the block stays done to
            the last moment then.
    """
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    breaking_off = _held.breaking_off
    _held.breaking_off = (*breaking_off, leave)
    try:
        with done_means_done():
            yield
            if for_good:
                _held.before.update(dict.fromkeys(_held.before, signal.SIG_IGN))
    finally:
        _held.breaking_off = breaking_off
        if not (for_good and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN):
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
