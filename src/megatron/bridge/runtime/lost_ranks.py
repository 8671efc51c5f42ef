"""Which rank is gone, where torch only says that a connection broke or says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep
from typing import cast

import torch.distributed as dist

from megatron.bridge.errors import InputError

_THERE = "megatron-bridge/there/{}"
_NOTICED = "megatron-bridge/noticed"

_ASKED_EVERY = timedelta(seconds=1)
"""How often a rank that waits asks whether another has noticed that one is gone."""

_ANSWER_SECONDS = 8.0
"""That a rank has to hear that another is gone, and to say so."""

_TIMED_OUT = "timed out"


@contextmanager
def naming_lost(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Where torch says that a connection broke, say which rank is gone.

    Args:
        group: of the ranks that work together, None for all of them.

    Raises:
        InputError: with the ranks that do not answer within some seconds.
    """
    try:
        yield
    except RuntimeError as error:
        lost = _lost(group)
        if not lost:
            raise
        names = ("rank " if len(lost) == 1 else "ranks ") + ", ".join(map(str, lost))
        if _TIMED_OUT in str(error).lower():
            raise InputError(
                f"waited for {names} until the time limit of the process group: every rank has to "
                f"make the same calls; look for what they do, or for what stopped them"
            ) from error
        verb = "is" if len(lost) == 1 else "are"
        raise InputError(
            f"{names} {verb} gone: look for its own message, or for what killed it. The last word "
            f"from torch: {str(error).strip().splitlines()[0][:200]}"
        ) from error


def wait_for(work: dist.Work | None, group: dist.ProcessGroup | None) -> None:
    """Wait for a collective, unless another rank has noticed that one is gone.

    With gloo, a rank that waits for one that lives is not told that a third is gone.

    Args:
        work: of the collective; None is done.
        group: as of `naming_lost`.

    Raises:
        RuntimeError: it did not succeed, or a rank is gone.
    """
    if work is None:
        return
    if "gloo" not in dist.get_backend(group):
        work.wait()
        return
    while True:
        try:
            work.wait(_ASKED_EVERY)
        except RuntimeError as error:
            if work.is_completed():
                work.wait()  # it was done in the same moment; or this says what was wrong
                return
            if _TIMED_OUT not in str(error).lower():
                raise
            if _is_noticed(group):
                raise RuntimeError("another rank noticed it") from error
        else:
            return


def group_or_world(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group; that of all ranks for None."""
    return cast("dist.ProcessGroup", group or dist.group.WORLD)


def _store(group: dist.ProcessGroup | None) -> dist.Store:
    """What the ranks of a group have in common, also where they are not all of one job."""
    store: dist.Store = dist.distributed_c10d._get_process_group_store(group_or_world(group))
    return store


def _is_noticed(group: dist.ProcessGroup | None) -> bool:
    return bool(_store(group).check([_NOTICED]))


def _lost(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks that do not say within some seconds that they are there."""
    try:
        store, own = _store(group), group_or_world(group).rank()
        store.set(_THERE.format(own), "")
        store.set(_NOTICED, "")
        end = monotonic() + _ANSWER_SECONDS
        numbers = dist.get_process_group_ranks(group)
        missing = {place: rank for place, rank in enumerate(numbers) if place != own}
        while missing and monotonic() < end:
            found = [place for place in missing if store.check([_THERE.format(place)])]
            missing = {place: rank for place, rank in missing.items() if place not in found}
            sleep(0.05)
    except RuntimeError:
        return []  # who serves the store is gone: torch's own words are all there is
    return [*missing.values()]
