"""Differences of buffers: what is made of them is the new buffer, in no more bytes than it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.bridge.exchange.delta import apply, encoded

HEADER = 32


def buffers(nbytes: int, changed: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One and the other, and how many words differ."""
    draw = torch.Generator().manual_seed(nbytes)
    before = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=draw)
    now, words = before.clone(), nbytes // 2
    places = torch.randperm(words, generator=draw)[: round(words * changed)]
    now.view(torch.int16)[places] += 1
    return now, before, len(places)


@pytest.mark.parametrize("nbytes", [16, 496, 512, 528, 131_072, 400_016, 2_097_168])
@pytest.mark.parametrize("changed", [0.0, 0.001, 0.03, 0.6, 1.0])
def test_what_is_made_of_a_message(nbytes: int, changed: float) -> None:
    now, before, count = buffers(nbytes, changed)
    message = encoded(now, before)
    assert message.numel() % 16 == 0
    assert message.numel() <= HEADER + nbytes
    if nbytes > 100_000 and 0.001 < changed < 0.5:
        # Of each changed word its two bytes and the least that says where it is.
        assert message.numel() <= 1.2 * 3 * count
    assert apply(message, before)
    assert torch.equal(before, now)


@pytest.mark.parametrize("changed", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("swap", [True, False])
def test_a_buffer_that_was_not_as_it_should_have_been(changed: float, swap: bool) -> None:
    now, before, _ = buffers(400_016, changed)
    message = encoded(now, before)
    words = before.view(torch.int64)
    if swap:
        words[[7, 4711]] = words[[4711, 7]]
    else:
        before[4711] ^= 1
    assert not apply(message, before)


@pytest.mark.parametrize("changed", [0.03, 0.6, 1.0])
def test_nothing_is_made_that_is_larger_than_the_buffer(
    changed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.bridge.exchange.delta._SLAB_WORDS", 1 << 16)
    now, before, _ = buffers(4_000_016, changed)
    made: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            made.extend(one.nbytes for one in tree_leaves(out) if isinstance(one, torch.Tensor))
            return out

    with Watched():
        message = encoded(now, before)
        assert apply(message, before)
    assert max(made) <= HEADER + now.nbytes
    assert torch.equal(before, now)
