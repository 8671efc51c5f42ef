"""Several threads that share out one row of items, and end together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator


def share_out[Item](
    items: Iterable[Item], work: Callable[[Iterator[Item]], None], threads: int
) -> None:
    """Call `work` in so many threads; each iterates over items that no other thread gets.

    Items are taken in order, one when it is asked for. Returns when all threads have ended. The
    first exception of a thread, or of `items`, is raised here, and no thread gets another item;
    an exception in the thread that waits here (Ctrl-C) also ends them all first.
    """
    source = iter(items)
    lock = threading.Lock()
    stop = threading.Event()
    errors: list[BaseException] = []

    def taken() -> Iterator[Item]:
        while True:
            with lock:
                if stop.is_set():
                    return
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def run() -> None:
        try:
            work(taken())
        except BaseException as error:  # noqa: BLE001 - the thread that waits raises it
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if errors:
        raise errors[0]
