"""Which way to the disk is the faster one: past the page cache, or through it?

That depends on the disk, on the file system, on the memory of the machine and on its kernel, so it
is found out: of a large output the first pieces go both ways in turns, each to its place, until the
better way is clear. Nothing is written for the trial alone.
"""

from __future__ import annotations

import threading

LEAST_OUTPUT = 1 << 30
"""Bytes from which on a trial is made. Of less, no more than a moment could be won."""

_LONGEST = 64 << 20
"""Bytes that go each way at most."""

_SHORTEST = 16 << 20
"""Bytes after which the cache may have lost."""

_CLEARLY = 1.5
_BETTER = 1.2
"""Times as fast. The cache has to win by so much: it costs memory and processor time."""


class WriteTrial:
    """Says for each piece which way it goes. Safe to use from several threads.

    Both ways are measured by the time from handing over a piece to having it on the disk, while
    other threads write other pieces.

    Args:
        nbytes: all that will be written.
    """

    def __init__(self, nbytes: int) -> None:
        self._lock = threading.Lock()
        self._given = {True: 0, False: 0}
        self._done = {True: 0, False: 0}
        self._seconds = {True: 0.0, False: 0.0}
        self._direct: bool | None = None if nbytes >= LEAST_OUTPUT else True

    def way(self, nbytes: int) -> tuple[bool, bool]:
        """How a piece of `nbytes` goes.

        Returns:
            Whether it goes past the cache, and whether it is part of the trial: then `note` or
            `decide` has to follow. While its last results are awaited, pieces go past the cache.
        """
        with self._lock:
            if self._direct is not None:
                return self._direct, False
            direct = self._given[True] <= self._given[False]
            if self._given[direct] >= _LONGEST:
                return True, False
            self._given[direct] += nbytes
            return direct, True

    def note(self, direct: bool, nbytes: int, seconds: float) -> None:
        """A piece of the trial is on the disk."""
        with self._lock:
            self._done[direct] += nbytes
            self._seconds[direct] += seconds
            least = min(self._done.values())
            if self._direct is not None or least < _SHORTEST:
                return
            # Seconds that one way takes for the bytes that the other one has written.
            past = self._seconds[True] * self._done[False]
            through = self._seconds[False] * self._done[True]
            if past * _CLEARLY <= through:
                self._direct = True
            elif least >= _LONGEST:
                self._direct = past < through * _BETTER

    def decide(self, direct: bool) -> None:
        """The other way is not there."""
        with self._lock:
            self._direct = direct
