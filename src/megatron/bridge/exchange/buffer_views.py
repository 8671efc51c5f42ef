"""Views of what a rank holds, of its buffers and of what it wants, made once and copied often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch

from megatron.bridge.dtypes import numpy_dtype, torch_dtype
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.exchange.fp8_blocks import quantize_to
from megatron.bridge.exchange.roster import Held
from megatron.bridge.exchange.route import Move
from megatron.bridge.exchange.windows import slot_bytes
from megatron.bridge.models.conversion.casting import ROUNDED, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.models.conversion.transfer import to_hf
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.tensors.box_pairs import axes_in_hf_order, megatron_part
from megatron.bridge.tensors.boxes import (
    Box,
    blocks_of,
    box_shape,
    full_box,
    relative,
    slices,
)
from megatron.bridge.tensors.torch_views import as_array, as_torch

type Destination = Callable[[Demand], torch.Tensor]
"""Where what is wanted goes: memory of the shape of the demand's box, in any strides."""


_CONVERTED_BYTES = 8 << 20
"""Of values that are converted at once."""


class Quantizing(NamedTuple):
    """Which tensors are quantized as they are packed.

    Attributes:
        block: extents of a block.
        unquantized: the dtype of each tensor before that, by its name. Each has a tensor of scales
            among what is held, with the name of the weight's scales as its key.
    """

    block: BlockFP8
    unquantized: Mapping[str, str]


class HeldValues:
    """The values of a part of a Megatron tensor that a rank holds.

    Args:
        held: the part.

    Attributes:
        dtype: of the values.
    """

    def __init__(self, held: Held) -> None:
        self._box, self._added = held.box, held.added
        self._data = held.data.detach().view(box_shape(held.box))
        self.dtype: torch.dtype = self._data.dtype if held.added is None else torch.float64

    @property
    def is_computed(self) -> bool:
        """Whether they are not just what is in memory."""
        return self._added is not None

    def part(self, copy: Copy, box: Box) -> torch.Tensor:
        """The values of a Hugging Face box within a copy, as they are held."""
        part = relative(megatron_part(copy, box), self._box)
        values = self._data[slices(part)]
        if self._added is None:
            return values
        rows, columns = part[-2:]
        return self._added.added_to(values, slice(*rows), slice(*columns))

    def in_hf_axes(self, copy: Copy, box: Box) -> torch.Tensor:
        """The values of a Hugging Face box within a copy, of the shape of it."""
        return _in_hf_axes(self.part(copy, box), copy)


class _Conversion(NamedTuple):
    """Values that are not copied bit by bit.

    Attributes:
        out: where they go.
        held: what they are of.
        move: of them.
        dtype: that they are to have, before they are quantized.
        casting: of values that it does not hold.
        scales: of all of the tensor, if it is quantized.
        block: extents of a block, if it is quantized.
    """

    out: torch.Tensor
    held: HeldValues
    move: Move
    dtype: str
    casting: Casting
    scales: torch.Tensor | None
    block: BlockFP8 | None

    def make(self) -> None:
        """Write them. Raises InexactCast: see `casting`."""
        for box in blocks_of(self.move.box, self.held.dtype.itemsize, _CONVERTED_BYTES):
            self._write(box, self.out[slices(relative(box, self.move.box))])

    def _write(self, box: Box, out: torch.Tensor) -> None:
        copy, values = self.move.copy, self.held.part(self.move.copy, box)
        if copy.offset or values.dtype != torch_dtype(self.dtype):
            culprit, shape = f"{self.move.name} from {copy.megatron_key}", tuple(out.shape)
            # What is computed has no bits of its own that could be kept.
            casting = ROUNDED if self.held.is_computed else self.casting
            array = as_array(values.cpu())
            array = to_hf(array, copy, shape, numpy_dtype(self.dtype), casting, culprit)
            values = as_torch(array).to(out.device)
        else:
            values = _in_hf_axes(values, copy)
        if self.scales is None or self.block is None:
            out.copy_(values)
        else:
            scales = self.scales[slices(self.block.scale_box(box))]
            quantize_to(out, values, scales, self.block, self.block.first(box))


@dataclass
class Copies:
    """Copies that are made together."""

    _to: list[torch.Tensor] = field(default_factory=list)
    _of: list[torch.Tensor] = field(default_factory=list)
    _converted: list[_Conversion] = field(default_factory=list)
    _held: dict[tuple[str, str, Box, Box], torch.Tensor] = field(default_factory=dict)

    def add(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Copy values to memory of the same shape."""
        self._to.append(out)
        self._of.append(values)

    def add_held(self, out: torch.Tensor, held: HeldValues, move: Move) -> None:
        """Copy what is held to memory of the shape of a move's box, bit by bit."""
        # Ranks that want the same are sent the same view.
        place = move.copy.hf_name, move.copy.megatron_key, move.held, move.box
        if (values := self._held.get(place)) is None:
            values = self._held[place] = held.in_hf_axes(move.copy, move.box)
        self.add(out, values)

    def add_converted(self, conversion: _Conversion) -> None:
        """Copy what is held as other bits."""
        self._converted.append(conversion)

    @torch.no_grad()
    def make(self) -> None:
        """Copy all of it.

        Raises:
            InexactCast: values do not fit the dtype that they are to have.
        """
        if self._to:
            torch._foreach_copy_(self._to, self._of)
        for one in self._converted:
            one.make()

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
        self._data = {(one.key, one.box): one.data for one in held}
        self._held = {(one.key, one.box): HeldValues(one) for one in held}

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
        own = Copies()
        send = Side([0] * self._count, Copies())
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
        receive = Side([0] * self._count, Copies())
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
        dtype, scales, block = self._plan.hf[move.name].dtype, None, None
        if self._quantizing is not None and move.name in self._quantizing.unquantized:
            block, dtype = self._quantizing.block, self._quantizing.unquantized[move.name]
            scales = self._scales(move.name, block)
        if block or move.copy.offset or held.dtype != torch_dtype(dtype):
            casting = self._casting.of(move.name)
            copies.add_converted(_Conversion(out, held, move, dtype, casting, scales, block))
        else:
            copies.add_held(out, held, move)

    def _scales(self, name: str, block: BlockFP8) -> torch.Tensor:
        place = name + SCALE_SUFFIX, full_box(block.scale_shape(self._plan.hf[name].shape))
        return self._data[place]

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
