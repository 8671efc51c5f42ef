"""Progress shown to a person: bars on a terminal, a few plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from megatron.bridge.cli.units import format_bytes
from megatron.bridge.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class ProgressLines:
    """A Progress that writes a line at every tenth of a task's bytes.

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


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start(self, task: str, total_bytes: int) -> None:
        self._task = self._bars.add_task(task, total=total_bytes)

    def advance(self, done_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, done_bytes)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A Progress that draws bars on stderr inside the block, and leaves nothing behind."""
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        yield _Bars(bars)
