"""The bars that huggingface_hub draws on stderr while it fetches: shown, unless they are hidden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def hide_download_bars() -> Iterator[None]:
    """Inside the block no bars are drawn. Costs nothing where nothing is fetched."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def fetching() -> Iterator[None]:
    """What asks the hub stands inside the block: there bars are as they were chosen."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not _hidden.get() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
