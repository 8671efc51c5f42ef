"""Progress in a log: a few plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

from megatron.bridge.progress import Progress, Silent
from megatron.bridge.text.sizes import format_bytes


class ProgressLines:
    """A Progress that writes a line whenever another part of the bytes of a task is done.

    Args:
        stream: to write to.
        parts: of a task, by default tenths.
        seconds: at least so long after the line before; the last line of a task is always written.
    """

    def __init__(self, stream: TextIO, parts: int = 10, seconds: float = 1.0) -> None:
        self._stream = stream
        self._parts = parts
        self._seconds = seconds
        self._task = ""
        self._total = self._done = self._shown = 0
        self._begin = self._last = 0.0

    def start(self, task: str, total_bytes: int) -> None:
        self._task, self._total = task, total_bytes
        self._done = self._shown = 0
        self._begin = self._last = time.monotonic()

    def advance(self, done_bytes: int) -> None:
        self._done += done_bytes
        part = min(self._done * self._parts // self._total, self._parts) if self._total else 0
        now = time.monotonic()
        if part > self._shown and (part == self._parts or now - self._last >= self._seconds):
            self._shown, self._last = part, now
            print(
                f"{self._task}: {100 * part // self._parts}% of {format_bytes(self._total)}, "
                f"{now - self._begin:.1f} s",
                file=self._stream,
                flush=True,
            )


def shown(
    progress: Progress | None, *, as_lines: bool
) -> Callable[[], AbstractContextManager[Progress]]:
    """What shows the progress in the one process that does: `progress`, or lines on stderr."""

    def show() -> AbstractContextManager[Progress]:
        return nullcontext(progress or (ProgressLines(sys.stderr) if as_lines else Silent()))

    return show
