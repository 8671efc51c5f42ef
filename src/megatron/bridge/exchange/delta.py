"""What changed between two buffers, as positions and values: fewer bytes than the buffer has.

Buffers are compared in words of two bytes, so that a value of any dtype is one or several. A
message is the smallest of three forms:

    whole    every word
    near     for each block of 256 words how many changed; of each its place in the block, one byte
    far      the same with blocks of 65,536 words and two bytes

It begins with the form, the number of words and two sums over all words of the new buffer, by
which the receiver knows that what it made of the message is what the sender has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron.bridge.exchange.windows import ALIGNMENT

_WHOLE = 0
_HEADER_BYTES = 32


class _Form(NamedTuple):
    """How places of changed words are written.

    Attributes:
        bits: of a place within its block.
        place: the dtype of a place.
        counts: the dtype of how many changed in a block.
    """

    bits: int
    place: torch.dtype
    counts: torch.dtype

    def nbytes(self, words: int, changed: int) -> int:
        """Of counts, values and places."""
        return self.blocks(words) * self.counts.itemsize + changed * (2 + self.place.itemsize)

    def blocks(self, words: int) -> int:
        """How many there are."""
        return -(-words // (1 << self.bits))


_FORMS = {
    1: _Form(8, torch.uint8, torch.int16),
    2: _Form(16, torch.int16, torch.int32),
}


def encoded(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What makes one buffer of another.

    Args:
        now: uint8 [a multiple of 16].
        before: likewise, as long.

    Returns:
        uint8 [a multiple of 16].
    """
    words, changed = now.view(torch.int16), (now.view(torch.int16) != before.view(torch.int16))
    places = changed.nonzero().flatten()
    sizes = {number: form.nbytes(len(words), len(places)) for number, form in _FORMS.items()}
    number = min(sizes, key=lambda one: sizes[one])
    if sizes[number] >= now.numel():
        parts, number = [now], _WHOLE
    else:
        form = _FORMS[number]
        counts = torch.bincount(places >> form.bits, minlength=form.blocks(len(words)))
        within = places & ((1 << form.bits) - 1)
        parts = [
            counts.to(form.counts).view(torch.uint8),
            words[places].view(torch.uint8),
            _narrowed(within, form.place).view(torch.uint8),
        ]
    header = torch.tensor([number, len(places), 0, 0], dtype=torch.int64, device=now.device)
    header[2:] = sums(now)
    used = _HEADER_BYTES + sum(part.numel() for part in parts)
    padding = torch.zeros(-used % ALIGNMENT, dtype=torch.uint8, device=now.device)
    return torch.cat([header.view(torch.uint8), *parts, padding])


def apply(message: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Make the new buffer of the old one, in place.

    Args:
        message: of `encoded`, for this buffer.
        buffer: uint8 [a multiple of 16], as it was before.

    Returns:
        Whether the buffer is now the sender's; False if it was not as it should have been.
    """
    header, message = message[:_HEADER_BYTES].view(torch.int64), message[_HEADER_BYTES:]
    number, changed = (int(one) for one in header[:2])
    if number == _WHOLE:
        buffer.copy_(message[: len(buffer)])
    else:
        words, form = buffer.view(torch.int16), _FORMS[number]
        blocks = form.blocks(len(words))
        ends = blocks * form.counts.itemsize, changed * 2, changed * form.place.itemsize
        counts, values, within = message[: sum(ends)].split(ends)
        starts = torch.arange(blocks, device=buffer.device) << form.bits
        places = starts.repeat_interleave(counts.view(form.counts).to(torch.int64))
        places += within.view(form.place).to(torch.int64) & ((1 << form.bits) - 1)
        words[places] = values.view(torch.int16)
    return bool(torch.equal(header[2:], sums(buffer)))


def sums(buffer: torch.Tensor) -> torch.Tensor:
    """int64 [2]: the sum of all words of eight bytes, and that of each times its place; wrapping.

    The second notices words that changed places.

    Args:
        buffer: uint8 [a multiple of 16].
    """
    total = torch.zeros(2, dtype=torch.int64, device=buffer.device)
    for start, words in enumerate(buffer.view(torch.int64).split(_SUM_WORDS)):
        first = start * _SUM_WORDS
        places = torch.arange(first + 1, first + 1 + len(words), device=buffer.device)
        total[0] += words.sum()
        total[1] += (words * places).sum()
    return total


_SUM_WORDS = 1 << 17
"""Summed at once: what that takes stays in a cache."""


def _narrowed(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Places as the lowest bits of a dtype, which may be signed."""
    if dtype == torch.int16:
        places = torch.where(places >= 1 << 15, places - (1 << 16), places)
    return places.to(dtype)
