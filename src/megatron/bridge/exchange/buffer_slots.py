"""Where pieces of tensors lie in a buffer, and which of them are messages of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from megatron.bridge.dtypes import itemsize, torch_dtype
from megatron.bridge.exchange.strided_copies import Elements
from megatron.bridge.exchange.transport import Message, Traffic
from megatron.bridge.exchange.windows import ALIGNMENT, Part, Piece
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Shape, absolute, full_box, volume

_MATRIX = 2
"""Axes of it."""


class Slot(NamedTuple):
    """A place in a buffer, or one for each of several ranks.

    Attributes:
        piece: that goes there.
        place: at the beginning of the buffer, its elements in the order in which the sender of the
            piece holds them. Engines hold a matrix as Megatron does, though files may have it
            transposed: then neither end has to turn it.
        starts: how many elements behind that there is a place, for each peer of the piece.
        is_message: of its own, which may be in other memory.
    """

    piece: Piece
    place: Elements
    starts: Sequence[int]
    is_message: bool

    @property
    def first(self) -> Elements:
        """The first of the places."""
        return self.place._replace(start=self.place.start + self.starts[0])


class BufferSlots:
    """A buffer that has all for one rank, then all for the next.

    Args:
        plan: of the model.
        memory: uint8.
        pieces: that go there, in an order that is the same at both ends.
        count: of ranks.
        message_bytes: what takes as many is a message of its own; None for nothing.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        memory: torch.Tensor,
        pieces: Sequence[Piece],
        count: int,
        message_bytes: int | None,
    ) -> None:
        self._plan, self._pieces, self._message_bytes = plan, pieces, message_bytes
        self._sizes = [0] * count
        for move, part in pieces:
            for peer in move.peers:
                self._sizes[peer] += part.nbytes
        self._memory = memory[: sum(self._sizes)]
        self._at = list(accumulate(self._sizes, initial=0))
        self._messages: list[Message] = []
        self._told = self._at[:count]  # up to here all bytes for a rank are in messages

    def __iter__(self) -> Iterator[Slot]:
        # Of a tensor's dtype.
        memory_as = cache(lambda name: self._memory.view(torch_dtype(self._plan.hf[name].dtype)))
        for whole in self._pieces:
            memory = memory_as(whole.move.name)
            for piece, is_message in self._cut(whole):
                starts = []
                for peer in piece.move.peers:
                    starts.append(self._at[peer] // memory.itemsize)  # it is aligned for any dtype
                    self._at[peer] += piece.part.nbytes
                place = Elements(memory, 0, _strides(piece.part.shape, piece.move.held_axes))
                yield Slot(piece, place, starts, is_message)

    def set_apart(self, slot: Slot, straight: torch.Tensor | None) -> None:
        """Make a slot a message to each of its peers, or from its one.

        Args:
            slot: the one that was asked for last.
            straight: the same bytes elsewhere; None if they are in the buffer.
        """
        for peer in slot.piece.move.peers:
            end = self._at[peer]
            start = end - slot.piece.part.nbytes
            self._tell(peer, start)
            memory = self._memory[start:end] if straight is None else straight
            self._messages.append(Message(peer, memory))
            self._told[peer] = end

    def traffic(self) -> Traffic:
        """What is sent or received, once all slots were asked for."""
        for peer in range(len(self._sizes)):
            self._tell(peer, self._at[peer])
        return Traffic(self._memory, self._sizes, self._messages)

    def _tell(self, peer: int, end: int) -> None:
        """Let what is in the buffer, and in no message, be one."""
        start = self._told[peer]
        if start < end:
            self._messages.append(Message(peer, self._memory[start:end]))
        self._told[peer] = end

    def _cut(self, piece: Piece) -> Iterable[tuple[Piece, bool]]:
        """Pieces, and whether they are messages; the same at both ends.

        Several matrices are a message each, for they may be in memories of their own, as those of
        experts are.
        """
        least, (move, part) = self._message_bytes, piece
        nbytes = volume(full_box(part.shape)) * itemsize(self._plan.hf[move.name].dtype)
        if least is None or nbytes < least or nbytes != part.nbytes:
            return [(piece, False)]
        axes = [axis for axis in move.held_axes if part.shape[axis] > 1]
        if len(axes) > _MATRIX:
            count = part.shape[axes[0]]
            nbytes //= count
            if nbytes >= least and nbytes % ALIGNMENT == 0:
                return [(_row(piece, axes[0], row, nbytes), True) for row in range(count)]
        return [(piece, True)]


def _row(piece: Piece, axis: int, row: int, nbytes: int) -> Piece:
    within = list(full_box(piece.part.shape))
    within[axis] = row, row + 1
    shape = tuple(stop - start for start, stop in within)
    return piece._replace(part=Part(absolute(tuple(within), piece.part.within), shape, nbytes))


@lru_cache(1 << 10)  # layers repeat
def _strides(shape: Shape, axes: Sequence[int]) -> tuple[int, ...]:
    """Of a box whose elements follow one another by some of its axes, the last one first."""
    strides, step = [1] * len(shape), 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)
