"""Views of what a rank holds, of its buffers and of what it wants, made once and copied often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.exchange.held_values import Conversion, HeldValues, Quantizing
from megatron.bridge.exchange.roster import Held
from megatron.bridge.exchange.route import Move
from megatron.bridge.exchange.strided_copies import Copies, CopyList, Elements
from megatron.bridge.exchange.windows import Piece
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, Shape, box_shape, relative

type Destination = Callable[[Demand], torch.Tensor]
"""Where what is wanted goes: memory of the shape of the demand's box, in any strides."""


@dataclass(frozen=True)
class Side:
    """One buffer of a rank, filled or emptied in one window.

    Attributes:
        sizes: bytes for each rank, in the order of the ranks.
        copies: between the buffer and the rank's own memory.
    """

    sizes: list[int]
    copies: Copies

    @property
    def nbytes(self) -> int:
        """Of all ranks."""
        return sum(self.sizes)


@dataclass(frozen=True)
class PackedWindow:
    """What a rank does in one window."""

    send: Side
    receive: Side
    own: Copies


class Packing:
    """Makes the views of windows.

    Args:
        plan: of the model.
        held: what this rank holds.
        casting: of values that the dtype in files does not hold.
        count: how many ranks there are.
        quantizing: of tensors that are quantized on the way; None for none.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        held: Sequence[Held],
        casting: Casting,
        count: int,
        quantizing: Quantizing | None = None,
    ) -> None:
        self._plan, self._casting, self._count = plan, casting, count
        self._quantizing = quantizing
        self._scales = {one.key: one.data for one in held if one.key.endswith(SCALE_SUFFIX)}
        memories: dict[str, dict[Box, HeldValues]] = defaultdict(dict)
        for one in held:
            memories[one.key][one.box] = HeldValues(one)
        self._memories = {key: BoxIndex(own.items()) for key, own in memories.items()}

    def window(
        self,
        sent: Sequence[Piece],
        received: Sequence[Piece],
        own: Sequence[Piece],
        send_buffer: torch.Tensor,
        receive_buffer: torch.Tensor,
        destination: Destination,
    ) -> PackedWindow:
        """The views of one window.

        Args:
            sent: what this rank sends in it.
            received: what it receives.
            own: what goes from itself to itself.
            send_buffer: uint8 [as many as they take].
            receive_buffer: likewise.
            destination: of what is wanted.
        """
        place = cache(lambda demand: _all_of(destination(demand)))
        send, receive, at_home = CopyList(), CopyList(), CopyList()
        sizes = self._sizes(sent), self._sizes(received)
        buffer = _Buffer(self._plan, send_buffer, sizes[0])
        for piece in sent:
            self._send(send, piece, *buffer.slots(piece))
        buffer = _Buffer(self._plan, receive_buffer, sizes[1])
        for piece in received:
            slot, (start,) = buffer.slots(piece)
            slot = Elements(slot.memory, start, slot.strides)
            receive.add(_wanted(place, piece), slot, piece.part.shape)
        for piece in own:
            self._send(at_home, piece, _wanted(place, piece), [0])
        return PackedWindow(
            Side(sizes[0], send.ready()), Side(sizes[1], receive.ready()), at_home.ready()
        )

    def _send(self, copies: CopyList, piece: Piece, place: Elements, starts: Sequence[int]) -> None:
        """Copy what is held of a piece to places that begin at some distances from one."""
        move, whole = piece.move, piece.box
        held = megatron_part(move.copy, whole)
        for shared, memory in self._memories[move.copy.megatron_key].overlapping(held):
            box = hf_part(move.copy, shared)
            shape, to = box_shape(box), place.part(relative(box, whole))
            if self._is_held(move, memory):
                copies.add(to, memory.elements(move.copy, box), shape, starts)
            else:  # computed once
                first = to._replace(start=to.start + starts[0])
                copies.compute(self._conversion(first.view(shape), memory, move, box).make)
                copies.add(to, first, shape, starts[1:])

    def _sizes(self, pieces: Sequence[Piece]) -> list[int]:
        """The bytes of a buffer that each rank has."""
        sizes = [0] * self._count
        for move, part in pieces:
            for peer in move.peers:
                sizes[peer] += part.nbytes
        return sizes

    def _is_held(self, move: Move, memory: HeldValues) -> bool:
        """Whether the bits that are wanted are just those that are in memory."""
        if self._quantizing is not None and move.name in self._quantizing.unquantized:
            return False
        return not move.copy.offset and memory.dtype == torch_dtype(self._plan.hf[move.name].dtype)

    def _conversion(
        self, out: torch.Tensor, memory: HeldValues, move: Move, box: Box
    ) -> Conversion:
        dtype, scales, block = self._plan.hf[move.name].dtype, None, None
        if self._quantizing is not None and move.name in self._quantizing.unquantized:
            block, dtype = self._quantizing.block, self._quantizing.unquantized[move.name]
            scales = self._scales[move.name + SCALE_SUFFIX]
        casting = self._casting.of(move.name)
        return Conversion(out, memory, move.name, move.copy, box, dtype, casting, scales, block)


class _Buffer:
    """A buffer that has all for one rank, then all for the next.

    Args:
        plan: of the model.
        memory: uint8.
        sizes: bytes for each rank.
    """

    def __init__(self, plan: ConversionPlan, memory: torch.Tensor, sizes: Sequence[int]) -> None:
        self._at = list(accumulate(sizes, initial=0))
        # Of a tensor's dtype.
        self._as = cache(lambda name: memory.view(torch_dtype(plan.hf[name].dtype)))

    def slots(self, piece: Piece) -> tuple[Elements, list[int]]:
        """The next places of a piece, in the order in which its sender holds the values.

        Engines hold a matrix as Megatron does, though files may have it transposed: then neither
        end has to turn it.

        Returns:
            A place at the beginning of the buffer, and how many elements behind it there is one for
            each peer.
        """
        (move, part), at = piece, self._at
        memory = self._as(move.name)
        size, starts = memory.itemsize, []
        for peer in move.peers:
            starts.append(at[peer] // size)  # a multiple of any dtype's size
            at[peer] += part.nbytes
        return Elements(memory, 0, _strides(part.shape, move.held_axes)), starts


@lru_cache(1 << 10)  # layers repeat
def _strides(shape: Shape, axes: Sequence[int]) -> tuple[int, ...]:
    """Of a box whose elements follow one another by some of its axes, the last one first."""
    strides, step = [1] * len(shape), 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _all_of(out: torch.Tensor) -> Elements:
    return Elements(out, int(out.storage_offset()), out.stride())


def _wanted(place: Callable[[Demand], Elements], piece: Piece) -> Elements:
    """Where a piece goes, by the place of all of its demand."""
    return place(piece.move.demand).part(piece.move.within).part(piece.part.within)
