"""Views of what a rank holds, of its buffers and of what it wants, made once and copied often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.exchange.buffer_slots import BufferSlots, Slot
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.exchange.held_values import Conversion, HeldValues, Quantizing
from megatron.bridge.exchange.roster import Held
from megatron.bridge.exchange.route import Move
from megatron.bridge.exchange.strided_copies import Copies, CopyList, Elements
from megatron.bridge.exchange.transport import Traffic
from megatron.bridge.exchange.windows import Piece
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, BoxIndex, box_shape, relative

type Destination = Callable[[Demand], torch.Tensor]
"""Where what is wanted goes: memory of the shape of the demand's box, in any strides."""


@dataclass(frozen=True)
class Side:
    """What a rank sends or receives in one window.

    Attributes:
        traffic: in one of its buffers, or in the rank's own memory.
        copies: between the buffer and the rank's own memory.
    """

    traffic: Traffic
    copies: Copies

    @property
    def nbytes(self) -> int:
        """For all ranks, or of them."""
        return sum(self.traffic.sizes)


@dataclass(frozen=True)
class PackedWindow:
    """What a rank does in one window."""

    send: Side
    receive: Side
    own: Copies

    @property
    def computes(self) -> bool:
        """Whether some of it is not copied bit by bit, which may be refused."""
        return bool(self.send.copies.computed or self.own.computed)


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
        message_bytes: int | None = None,
    ) -> PackedWindow:
        """The views of one window.

        Args:
            sent: what this rank sends in it.
            received: what it receives.
            own: what goes from itself to itself.
            send_buffer: uint8 [as many as they take].
            receive_buffer: likewise.
            destination: of what is wanted.
            message_bytes: what takes as many is a message of its own, which goes past the buffer at
                each end where it lies in memory just as it is sent; None if all goes through the
                buffers. The same at both ends.
        """
        place = cache(lambda demand: _all_of(destination(demand)))
        send, receive, at_home = CopyList(), CopyList(), CopyList()
        of_sent = BufferSlots(self._plan, send_buffer, sent, self._count, message_bytes)
        for slot in of_sent:
            straight = self._held_straight(slot) if slot.is_message else None
            if slot.is_message:
                of_sent.set_apart(slot, straight)
            if straight is None:
                self._send(send, slot.piece, slot.place, slot.starts)
        of_received = BufferSlots(self._plan, receive_buffer, received, self._count, message_bytes)
        for slot in of_received:
            wanted, shape = _wanted(place, slot.piece), slot.piece.part.shape
            straight = wanted.bytes_as(slot.place, shape) if slot.is_message else None
            if slot.is_message:
                of_received.set_apart(slot, straight)
            if straight is None:
                receive.add(wanted, slot.first, shape)
        for piece in own:
            self._send(at_home, piece, _wanted(place, piece), [0])
        return PackedWindow(
            Side(of_sent.traffic(), send.ready()),
            Side(of_received.traffic(), receive.ready()),
            at_home.ready(),
        )

    def _held_straight(self, slot: Slot) -> torch.Tensor | None:
        """What is held of a piece, as bytes, if it lies in one memory as it does in its slot."""
        move, box = slot.piece.move, slot.piece.box
        held = megatron_part(move.copy, box)
        (shared, memory), *others = self._memories[move.copy.megatron_key].overlapping(held)
        if others or shared != held or not self._is_held(move, memory):
            return None
        return memory.elements(move.copy, box).bytes_as(slot.place, slot.piece.part.shape)

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


def _all_of(out: torch.Tensor) -> Elements:
    return Elements(out, int(out.storage_offset()), out.stride())


def _wanted(place: Callable[[Demand], Elements], piece: Piece) -> Elements:
    """Where a piece goes, by the place of all of its demand."""
    return place(piece.move.demand).part(piece.move.within).part(piece.part.within)
