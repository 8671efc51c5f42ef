"""Threads that share out items: each gets its own, and all have ended when anything is raised."""

import signal
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from megatron.bridge.engine.worker_threads import run_in_threads


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is raised also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_each_item_is_worked_on_once_by_one_thread() -> None:
    seen: list[int] = []
    together = threading.Barrier(3, timeout=30)

    def work(items: Iterator[int]) -> None:
        first = next(items)
        together.wait()  # so every thread has one
        seen.extend([first, *items])

    run_in_threads(iter(range(1000)), work, 3)
    assert sorted(seen) == list(range(1000))


def test_what_gives_items_may_fail() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        run_in_threads(items(), lambda taken: list(taken) and None, 2)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_ctrl_c_is_raised_when_all_threads_have_ended(times: int) -> None:
    """However often it is pressed while they end."""
    main = threading.main_thread().ident
    assert main is not None
    ended = []
    together = threading.Barrier(3, timeout=30)

    def work(items: Iterator[int]) -> None:
        first = next(items)
        together.wait()
        if first == 2:
            for _ in range(times):
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.05)  # the others are still at their items then
        else:
            time.sleep(0.05 * times)
        for _ in items:
            pass
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_in_threads(count(), work, 3)
    assert len(ended) == 3


def test_an_error_is_raised_when_all_threads_have_ended() -> None:
    ended = []
    together = threading.Barrier(3, timeout=30)

    def work(items: Iterator[int]) -> None:
        first = next(items)
        together.wait()
        if first == 2:
            raise OSError("the disk is full")
        time.sleep(0.05)
        for _ in items:
            pass
        ended.append(True)

    with pytest.raises(OSError, match="full"):
        run_in_threads(count(), work, 3)
    assert len(ended) == 2
