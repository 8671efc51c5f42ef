"""Differences of buffers: what is made of them is the new buffer, in no more bytes than it has."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("nbytes", [16, 496, 512, 528, 131_072, 400_016])
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
