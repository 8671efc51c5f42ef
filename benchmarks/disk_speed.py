"""How fast the disk is written, while the benchmarks run: past the page cache and through it."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.processes import BenchmarkError

_BLOCK = 8 << 20

WAYS = {
    "one direct stream": (True, 1),
    "four direct streams": (True, 4),
    "through the cache, and fsync": (False, 1),
}
"""What is measured: whether past the cache, and how many files at once."""

type Speeds = dict[str, list[float]]
"""Way -> GB/s, each time that it was measured."""


def measure(folder: Path, nbytes: int) -> Speeds:
    """Write `nbytes` of random bytes in each way, until they are on the disk.

    Raises BenchmarkError if the file system knows no direct writes.
    """
    return {way: [write(folder, *how, nbytes)] for way, how in WAYS.items()}


def write(folder: Path, direct: bool, streams: int, nbytes: int) -> float:
    """GB/s of so many files written at once, each by a thread."""
    os.sync()
    block = mmap.mmap(-1, _BLOCK)
    block.write(os.urandom(_BLOCK))
    paths = [folder / f"speed-{number}" for number in range(streams)]
    flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
    try:
        began = time.perf_counter()
        files = [os.open(path, flags) for path in paths]
        blocks = max(1, nbytes // _BLOCK // streams)
        work = [threading.Thread(target=_write, args=(file, block, blocks)) for file in files]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        written = sum(os.fstat(file).st_size for file in files)
        for file in files:
            os.close(file)
        seconds = time.perf_counter() - began
    except OSError as error:
        raise BenchmarkError(f"{folder}: the disk's speed: {error.strerror}") from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return written / seconds / 1e9


def _write(file: int, block: mmap.mmap, blocks: int) -> None:
    for number in range(blocks):
        os.pwrite(file, block, number * _BLOCK)
    os.fsync(file)


def joined(speeds: Iterable[Speeds]) -> Speeds:
    """All measurements, by way."""
    every = list(speeds)
    return {way: [value for one in every for value in one[way]] for way in WAYS}
