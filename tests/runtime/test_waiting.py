"""Waiting for a collective while another rank may be gone: asked for, and no false alarm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from megatron.bridge.runtime.lost_ranks import wait_for


class Work:
    """A collective that is done in the moment in which a wait for it ends without it."""

    def __init__(self, error: str | None = None) -> None:
        self.error, self.waits, self.done = error, 0, False

    def wait(self, *_: Any) -> bool:
        self.waits += 1
        if not self.done:
            self.done = True
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)
        return True

    def is_completed(self) -> bool:
        return self.done


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_is_done_when_a_wait_ends_is_done() -> None:
    work = Work()
    wait_for(work, None)  # type: ignore[arg-type]
    assert work.waits == 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "error", ["Timed out waiting 60000ms for recv", "Connection closed by peer"]
)
def test_what_went_wrong_is_said(error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        wait_for(Work(error), None)  # type: ignore[arg-type]
