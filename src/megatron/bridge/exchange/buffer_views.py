"""Views of what a rank holds, of its buffers and of what it wants, made once and copied often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron.bridge.dtypes import numpy_dtype, torch_dtype
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.exchange.roster import Held
from megatron.bridge.exchange.route import Move
from megatron.bridge.exchange.windows import slot_bytes
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.models.conversion.transfer import to_hf
from megatron.bridge.tensors.box_pairs import axes_in_hf_order, megatron_part
from megatron.bridge.tensors.boxes import Box, box_shape, relative, slices
from megatron.bridge.tensors.torch_views import as_array, as_torch

type Destination = Callable[[Demand], torch.Tensor]
"""Where what is wanted goes: memory of the shape of the demand's box, in any strides."""


class _Conversion(NamedTuple):
    """Values that are not copied bit by bit."""

    out: torch.Tensor
    values: torch.Tensor
    move: Move
    dtype: np.dtype[Any]


@dataclass
class Copies:
    """Copies that are made together.

    Attributes:
        casting: of values that the dtype they are to have does not hold.
    """

    casting: Casting
    _to: list[torch.Tensor] = field(default_factory=list)
    _of: list[torch.Tensor] = field(default_factory=list)
    _converted: list[_Conversion] = field(default_factory=list)
    _held: dict[tuple[str, str, Box, Box], torch.Tensor] = field(default_factory=dict)

    def add(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Copy values to memory of the same shape."""
        self._to.append(out)
        self._of.append(values)

    def add_held(self, out: torch.Tensor, held: torch.Tensor, move: Move, dtype: str) -> None:
        """Copy what is held to memory of the shape of a move's box.

        Args:
            out: the memory.
            held: the part of a Megatron tensor that the move's sender holds.
            move: lies within it.
            dtype: that the values have on the way.
        """
        # Ranks that want the same are sent the same view.
        place = move.copy.hf_name, move.copy.megatron_key, move.held, move.box
        if (values := self._held.get(place)) is None:
            part = megatron_part(move.copy, move.box)
            values = held[slices(relative(part, move.held))]
            if not self._is_converted(values, move, dtype):
                values = _in_hf_axes(values, move.copy)
            self._held[place] = values
        if self._is_converted(values, move, dtype):
            self._converted.append(_Conversion(out, values, move, numpy_dtype(dtype)))
        else:
            self.add(out, values)

    @staticmethod
    def _is_converted(values: torch.Tensor, move: Move, dtype: str) -> bool:
        return bool(move.copy.offset) or values.dtype != torch_dtype(dtype)

    @torch.no_grad()
    def make(self) -> None:
        """Copy all of it.

        Raises:
            InexactCast: see `casting`.
        """
        if self._to:
            torch._foreach_copy_(self._to, self._of)
        for out, values, move, dtype in self._converted:
            array, shape = as_array(values.cpu()), tuple(out.shape)
            culprit = f"{move.name} from {move.copy.megatron_key}"
            out.copy_(as_torch(to_hf(array, move.copy, shape, dtype, self.casting, culprit)))

    @torch.no_grad()
    def back(self) -> None:
        """Copy from where `make` copies to, as far as that is bit by bit."""
        if self._to:
            torch._foreach_copy_(self._of, self._to)


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
    """

    def __init__(
        self, plan: ConversionPlan, held: Iterable[Held], casting: Casting, count: int
    ) -> None:
        self._plan, self._casting, self._count = plan, casting, count
        self._held = {
            (one.key, one.box): one.data.detach().view(box_shape(one.box)) for one in held
        }

    def window(
        self,
        sent: Sequence[Move],
        received: Sequence[Move],
        send_buffer: torch.Tensor,
        receive_buffer: torch.Tensor,
        destination: Destination,
    ) -> PackedWindow:
        """The views of one window.

        Args:
            sent: the moves that this rank sends, by receiver.
            received: the moves that it receives, by sender.
            send_buffer: uint8 [as many as they take].
            receive_buffer: likewise.
            destination: of what is wanted.
        """
        own = Copies(self._casting)
        send = Side([0] * self._count, Copies(self._casting))
        at = 0
        for move in sent:
            if move.receiver == move.sender:
                out = _part_of(destination(move.demand), move)
                self._copy_held(own, out, move)
                continue
            self._copy_held(send.copies, self._slot(send_buffer, at, move), move)
            nbytes = slot_bytes(self._plan, move)
            send.sizes[move.receiver] += nbytes
            at += nbytes
        receive = Side([0] * self._count, Copies(self._casting))
        at = 0
        for move in received:
            if move.receiver == move.sender:
                continue
            out = _part_of(destination(move.demand), move)
            receive.copies.add(out, self._slot(receive_buffer, at, move))
            nbytes = slot_bytes(self._plan, move)
            receive.sizes[move.sender] += nbytes
            at += nbytes
        return PackedWindow(send, receive, own)

    def _copy_held(self, copies: Copies, out: torch.Tensor, move: Move) -> None:
        held = self._held[move.copy.megatron_key, move.held]
        copies.add_held(out, held, move, self._plan.hf[move.name].dtype)

    def _slot(self, buffer: torch.Tensor, at: int, move: Move) -> torch.Tensor:
        """The bytes of a move, in the order in which its sender holds them.

        Engines hold a matrix as Megatron does, though files may have it transposed: then neither
        end has to turn it.
        """
        dtype = torch_dtype(self._plan.hf[move.name].dtype)
        shape = box_shape(megatron_part(move.copy, move.box))
        strides = [*accumulate(reversed(shape), mul, initial=1)][-2::-1]
        # `at` is a multiple of any dtype's size.
        slot = buffer.view(dtype).as_strided(shape, strides, at // dtype.itemsize)
        return _in_hf_axes(slot, move.copy)


def _part_of(wanted: torch.Tensor, move: Move) -> torch.Tensor:
    return wanted[slices(relative(move.box, move.demand.box))]


def _in_hf_axes(values: torch.Tensor, copy: Copy) -> torch.Tensor:
    """A part of the Megatron box, its axes as those of the Hugging Face box; the same memory."""
    order = axes_in_hf_order(copy)
    others = [axis for axis in range(values.dim()) if axis not in order]
    long = values.permute(*order, *others)
    for _ in others:
        long = long.select(-1, 0)
    for axis, (start, stop) in enumerate(copy.hf_box):
        if stop - start == 1:
            long = long.unsqueeze(axis)
    return long
