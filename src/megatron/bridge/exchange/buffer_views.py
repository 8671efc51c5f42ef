"""Views of what a rank holds, of its buffers and of what it wants, made once and copied often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from megatron.bridge.dtypes import numpy_dtype, torch_dtype
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.exchange.fp8_blocks import quantize_to
from megatron.bridge.exchange.roster import Held
from megatron.bridge.exchange.route import Move
from megatron.bridge.exchange.strided_copies import Copies, CopyList, Elements
from megatron.bridge.exchange.windows import Piece
from megatron.bridge.models.conversion.casting import ROUNDED, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.models.conversion.transfer import to_hf
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.tensors.box_pairs import (
    axes_in_hf_order,
    axis_pairs,
    hf_part,
    megatron_part,
)
from megatron.bridge.tensors.boxes import (
    Box,
    BoxIndex,
    Shape,
    blocks_of,
    box_shape,
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

    def elements(self, copy: Copy, box: Box) -> Elements:
        """Where the values of `in_hf_axes` are, if they are just what is in memory."""
        strides, start = [0] * len(box), self._data.storage_offset()
        part, steps = megatron_part(copy, box), self._data.stride()
        for (begin, _), (zero, _), step in zip(part, self._box, steps, strict=True):
            start += (begin - zero) * step
        for axis, hf_axis in axis_pairs(copy):
            strides[hf_axis] = steps[axis]
        return Elements(self._data, start, tuple(strides))


class _Conversion(NamedTuple):
    """Values that are not copied bit by bit.

    Attributes:
        out: where they go.
        held: what they are of.
        name: of the tensor that is wanted.
        copy: of the plan, how they are held.
        box: of the tensor.
        dtype: that they are to have, before they are quantized.
        casting: of values that it does not hold.
        scales: of all of the tensor, if it is quantized.
        block: extents of a block, if it is quantized.
    """

    out: torch.Tensor
    held: HeldValues
    name: str
    copy: Copy
    box: Box
    dtype: str
    casting: Casting
    scales: torch.Tensor | None
    block: BlockFP8 | None

    def make(self) -> None:
        """Write them. Raises InexactCast: see `casting`."""
        for box in blocks_of(self.box, self.held.dtype.itemsize, _CONVERTED_BYTES):
            self._write(box, self.out[slices(relative(box, self.box))])

    def _write(self, box: Box, out: torch.Tensor) -> None:
        copy, values = self.copy, self.held.part(self.copy, box)
        if copy.offset or values.dtype != torch_dtype(self.dtype):
            culprit, shape = f"{self.name} from {copy.megatron_key}", tuple(out.shape)
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
        memories: dict[str, list[tuple[Box, HeldValues]]] = defaultdict(list)
        for one in held:
            memories[one.key].append((one.box, HeldValues(one)))
        self._memories = {key: BoxIndex(own) for key, own in memories.items()}

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
            move, part = piece
            slot, (start,) = buffer.slots(piece)
            slot = Elements(slot.memory, start, slot.strides)
            to = place(move.demand).part(move.within).part(part.within)
            receive.add(to, slot, part.shape)
        for piece in own:
            move, part = piece
            to = place(move.demand).part(move.within).part(part.within)
            self._send(at_home, piece, to, [0])
        return PackedWindow(
            Side(sizes[0], send.ready()), Side(sizes[1], receive.ready()), at_home.ready()
        )

    def _send(self, copies: CopyList, piece: Piece, place: Elements, starts: Sequence[int]) -> None:
        """Copy what is held of a move to places that begin at some distances from one."""
        move, whole = piece.move, piece.box
        held = megatron_part(move.copy, whole)
        for shared, memory in self._memories[move.copy.megatron_key].overlapping(held):
            box = hf_part(move.copy, shared)
            shape, to = box_shape(box), place.part(relative(box, whole))
            first = to._replace(start=to.start + starts[0])
            step = self._conversion(first.view(shape), memory, move, box)
            if step is None:
                copies.add(to, memory.elements(move.copy, box), shape, starts)
            else:
                copies.compute(step.make)
                copies.add(to, first, shape, starts[1:])

    def _sizes(self, pieces: Sequence[Piece]) -> list[int]:
        """The bytes of a buffer that each rank has."""
        sizes = [0] * self._count
        for move, part in pieces:
            for peer in move.peers:
                sizes[peer] += part.nbytes
        return sizes

    def _conversion(
        self, out: torch.Tensor, held: HeldValues, move: Move, box: Box
    ) -> _Conversion | None:
        """What makes the bits of a box, if they are not those that are held."""
        dtype, scales, block = self._plan.hf[move.name].dtype, None, None
        if self._quantizing is not None and move.name in self._quantizing.unquantized:
            block, dtype = self._quantizing.block, self._quantizing.unquantized[move.name]
            scales = self._scales[move.name + SCALE_SUFFIX]
        if not (block or move.copy.offset or held.dtype != torch_dtype(dtype)):
            return None
        casting = self._casting.of(move.name)
        return _Conversion(out, held, move.name, move.copy, box, dtype, casting, scales, block)


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


@lru_cache(1 << 12)  # layers repeat
def _strides(shape: Shape, axes: Sequence[int]) -> tuple[int, ...]:
    """Of a box whose elements follow one another by some of its axes, the last one first."""
    strides, step = [1] * len(shape), 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _all_of(out: torch.Tensor) -> Elements:
    return Elements(out, int(out.storage_offset()), out.stride())


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
