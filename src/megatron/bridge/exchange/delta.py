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

from collections.abc import Iterable
from typing import NamedTuple

import torch

from megatron.bridge.exchange.windows import ALIGNMENT

_WHOLE = 0
_HEADER_BYTES = 32
_SLAB_WORDS = 1 << 20
"""Looked at at once, whole blocks of any form: while places are found they take four times the
memory of the words."""


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

    def written(self, words: torch.Tensor, before: torch.Tensor) -> list[torch.Tensor]:
        """Counts, values and places, as bytes.

        Args:
            words: int16 [as many as there are].
            before: likewise.
        """
        counts, values, places = [], [], []
        for slab, old in _slabs(words, before):
            at = (slab != old).nonzero().flatten()
            of_block = torch.bincount(at >> self.bits, minlength=self.blocks(len(slab)))
            counts.append(of_block.to(self.counts))
            values.append(slab[at])
            places.append(_narrowed(at & self._mask, self.place))
        return [part.view(torch.uint8) for part in (*counts, *values, *places)]

    def put(self, message: torch.Tensor, words: torch.Tensor, changed: int) -> None:
        """Put the values of a message in their places.

        Args:
            message: uint8, beginning with what `written` gives.
            words: int16, as they were before.
            changed: how many values there are.
        """
        blocks = self.blocks(len(words))
        ends = blocks * self.counts.itemsize, changed * 2, changed * self.place.itemsize
        counts, values, within = message[: sum(ends)].split(ends)
        of_slab = counts.view(self.counts).to(torch.int64).split(_SLAB_WORDS >> self.bits)
        sizes = torch.stack([of_block.sum() for of_block in of_slab]).tolist()
        for slab, of_block, new, at in zip(
            words.split(_SLAB_WORDS),
            of_slab,
            values.view(torch.int16).split(sizes),
            within.view(self.place).split(sizes),
            strict=True,
        ):
            starts = torch.arange(len(of_block), device=words.device) << self.bits
            places = starts.repeat_interleave(of_block)
            places += at.to(torch.int64) & self._mask
            slab[places] = new

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1


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
    words, old = now.view(torch.int16), before.view(torch.int16)
    changed = int(sum((new != was).count_nonzero() for new, was in _slabs(words, old)))
    sizes = {number: form.nbytes(len(words), changed) for number, form in _FORMS.items()}
    number = min(sizes, key=lambda one: sizes[one])
    if sizes[number] >= now.numel():
        parts, number = [now], _WHOLE
    else:
        parts = _FORMS[number].written(words, old)
    header = torch.tensor([number, changed, 0, 0], dtype=torch.int64, device=now.device)
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
        _FORMS[number].put(message, buffer.view(torch.int16), changed)
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


def _slabs(
    words: torch.Tensor, before: torch.Tensor
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(words.split(_SLAB_WORDS), before.split(_SLAB_WORDS), strict=True)


def _narrowed(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Places as the lowest bits of a dtype, which may be signed."""
    if dtype == torch.int16:
        places = torch.where(places >= 1 << 15, places - (1 << 16), places)
    return places.to(dtype)
