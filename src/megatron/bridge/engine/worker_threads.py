"""A parallel for-each: several threads take items from one iterator, and end together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator


def run_in_threads[Item](
    items: Iterable[Item], work: Callable[[Iterator[Item]], None], threads: int
) -> None:
    """Call `work` in several threads; each iterates over items that no other thread gets.

    Args:
        items: taken in order, one when it is asked for.
        work: called once in each thread, with its items.
        threads: how many.

    Raises:
        BaseException: the first of `work` or of `items`, or one in the thread that waits here
            (Ctrl-C). After that no thread gets another item, and nothing is raised before all calls
            of `work` have ended.
    """
    _Workers(iter(items), work, threads).run()


class _Workers[Item]:
    """Threads are not joined: in Python 3.12 an interrupted join takes a thread for ended."""

    def __init__(
        self, items: Iterator[Item], work: Callable[[Iterator[Item]], None], threads: int
    ) -> None:
        self._items = items
        self._work = work
        self._threads = threads
        self._changed = threading.Condition()  # its lock guards all below
        self._stopped = False
        self._active = self._ended = 0
        self._errors: list[BaseException] = []

    def run(self) -> None:
        try:
            for _ in range(self._threads):
                threading.Thread(target=self._begin).start()
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._ended == self._threads)
        finally:
            self._stop()
        if self._errors:
            raise self._errors[0]

    def _stop(self) -> None:
        """Wait for all calls of `work`, however often Ctrl-C is pressed meanwhile."""
        while True:
            try:
                with self._changed:
                    self._stopped = True
                    self._changed.wait_for(lambda: not self._active)
                return
            except KeyboardInterrupt as error:
                self._errors.append(error)

    def _begin(self) -> None:
        with self._changed:
            if self._stopped:
                return
            self._active += 1
        try:
            self._work(self._taken())
        except BaseException as error:  # noqa: BLE001 - the thread that waits raises it
            with self._changed:
                self._errors.append(error)
                self._stopped = True
        finally:
            with self._changed:
                self._active -= 1
                self._ended += 1
                self._changed.notify_all()

    def _taken(self) -> Iterator[Item]:
        while True:
            with self._changed:
                if self._stopped:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    return
            yield item
