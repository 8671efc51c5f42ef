"""What a rank holds, as values of Hugging Face tensors: in place, or computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from megatron.bridge.dtypes import numpy_dtype, torch_dtype
from megatron.bridge.exchange.fp8_blocks import quantize_to
from megatron.bridge.exchange.roster import Held
from megatron.bridge.exchange.strided_copies import Elements
from megatron.bridge.models.conversion.casting import ROUNDED, Casting
from megatron.bridge.models.conversion.plan import Copy
from megatron.bridge.models.conversion.transfer import to_hf
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.tensors.box_pairs import axes_in_hf_order, axis_pairs, megatron_part
from megatron.bridge.tensors.boxes import Box, blocks_of, box_shape, relative, slices
from megatron.bridge.tensors.torch_views import as_array, as_torch

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


class Conversion(NamedTuple):
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
