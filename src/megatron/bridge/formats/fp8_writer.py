"""Quantizing weights again, into the FP8 form of a reference: its tensors, names and scale dtypes.

The scale of a block is its largest magnitude / 448, the largest number of e4m3. A block whose
values are exactly multiples of e4m3 numbers and the reference's own scale keeps that scale, so what
was not changed since it was read from the reference comes back bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.engine.pieces import FillTensor
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained.fp8 import (
    DequantizedTensors,
    block_rows,
    e4m3_to_float,
)
from megatron.bridge.models.hf_pretrained.quantization import LARGEST_E4M3, BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.tensors.arrays import Array, copy, empty, words
from megatron.bridge.tensors.boxes import Box, blocks_of, box_shape, relative, slices

_SCALES_AT_ONCE = 256
"""Scales that are computed together: of 128x128 values each, so of 8 MiB in BF16."""


def fp8_reference(reference: PreTrainedVLM) -> DequantizedTensors:
    """The weights of a reference that says how to quantize. Raises InputError for any other."""
    if reference.quantization is None:
        raise InputError(
            f"{reference.name_or_path} is not quantized, so it does not say how to write FP8; "
            f"give an FP8 release as the reference, or export without --fp8 (fp8=False)"
        )
    weights = reference.weights if reference.has_weights else None
    if not isinstance(weights, DequantizedTensors):
        raise InputError(
            f"{reference.name_or_path} holds no weights, so it does not say which of them are "
            f"quantized; give the whole FP8 release as the reference"
        )
    return weights


class Requantizer:
    """Makes the tensors of an FP8 reference from those of the dequantized model, box by box.

    Files hold scales and weights apart, so a weight is read once for its values and once for its
    scales.

    Args:
        reference: says which tensors are quantized, and how.
        weight: fills memory with a box of a tensor of the dequantized model, by its name.
    """

    def __init__(self, reference: DequantizedTensors, weight: FillTensor) -> None:
        self._reference = reference
        self._weight = weight

    @property
    def rows_multiple(self) -> dict[str, int]:
        """The rows of a block, by name of each tensor that is only made in whole blocks of rows."""
        return dict.fromkeys(self._reference.quantized, self._reference.quantization.rows)

    def fill(self, name: str, box: Box, out: Array) -> None:
        """Fill `out` with a box of the tensor of this name as the reference's files have it.

        The box of a quantized weight is made of whole blocks.

        Raises:
            CheckpointError: the weight holds values that are not finite.
        """
        quantized = self._reference.quantized
        owner = name.removesuffix(SCALE_SUFFIX)
        if name in quantized:
            weight, scales = self._with_scales(name, box)
            quantize(weight, scales, self._reference.quantization, out)
        elif owner != name and owner in quantized:
            for blocks in blocks_of(box, 1, _SCALES_AT_ONCE):
                _, scales = self._with_scales(owner, self._weight_box(owner, blocks))
                copy(scales.astype(out.dtype), out[slices(relative(blocks, box))])
        else:
            self._weight(name, box, out)

    def _with_scales(self, name: str, box: Box) -> tuple[Array, Array]:
        """A box of whole blocks of a weight, and its scales in float32.

        Every scale is a number of the dtype that files hold.
        """
        reference = self._reference
        weight = empty(box_shape(box), reference[name].dtype)
        self._weight(name, box, weight)
        dtype = numpy_dtype(reference.quantized[name].dtype)
        preferred = reference.read_scales(name, reference.quantization.scale_box(box))
        try:
            return weight, block_scales(weight, reference.quantization, dtype, preferred)
        except ValueError as error:
            raise CheckpointError(f"{name}: cannot be quantized: {error}") from error

    def _weight_box(self, name: str, blocks: Box) -> Box:
        """The box of a weight that a box of its scales stands for."""
        *leading, (row, row_end), (column, column_end) = blocks
        *_, rows, columns = self._reference[name].shape
        block = self._reference.quantization
        return (
            *leading,
            (row * block.rows, min(row_end * block.rows, rows)),
            (column * block.columns, min(column_end * block.columns, columns)),
        )


def block_scales(
    weight: Array, block: BlockFP8, dtype: np.dtype[Any], preferred: Array | None = None
) -> Array:
    """The scales of a weight, each the largest magnitude of its block / 448; 1 for zeros.

    Args:
        weight: [..., rows, columns]; in bfloat16 where `preferred` is given.
        block: extents of a block.
        dtype: that scales are rounded to, that of the files.
        preferred: scales, of the shape of the result, that are kept where the block's values come
            back exactly with them.

    Returns:
        The scales in float32, [..., blocks of rows, blocks of columns].

    Raises:
        ValueError: the weight holds values that are not finite.
    """
    scales = empty(block.scale_shape(weight.shape), "F32")
    for number, (start, stop) in enumerate(block_rows(weight.shape[-2], block)):
        part = weight[..., start:stop, :]
        values = part.astype(np.float32)
        largest = _largest_of_blocks(np.abs(values), block)
        if not np.isfinite(largest).all():
            raise ValueError("it holds values that are not finite")
        # In float32 and then rounded: quantizing divides by what files hold.
        found = (largest / np.float32(LARGEST_E4M3)).astype(dtype).astype(np.float32)
        found[found == 0] = 1.0
        if preferred is not None:
            wanted = preferred[..., number, :]
            again = e4m3_to_float(float_to_e4m3(_quotients(values, wanted, block)))
            with np.errstate(over="ignore"):
                again *= _spread(wanted, part, block)
                differs = words(again.astype(weight.dtype)) != words(part)
            exact = ~_largest_of_blocks(differs, block)
            found = np.where(exact, wanted, found)
        scales[..., number, :] = found
    return scales


def quantize(weight: Array, scales: Array, block: BlockFP8, out: Array) -> None:
    """Fill `out` with a weight as e4m3, divided by the float32 scales of its blocks.

    Args:
        weight: [..., rows, columns].
        scales: float32, [..., blocks of rows, blocks of columns].
        block: extents of a block.
        out: e4m3, of the shape of the weight.
    """
    for number, (start, stop) in enumerate(block_rows(weight.shape[-2], block)):
        values = weight[..., start:stop, :].astype(np.float32)
        quotients = _quotients(values, scales[..., number, :], block)
        copy(float_to_e4m3(quotients), out[..., start:stop, :])


def float_to_e4m3(values: Array) -> Array:
    """Float32 numbers of up to 448 in magnitude, rounded to e4m3, to even where between two.

    Looked up by their first 16 bits: of the others only matters whether all are zero. A third of
    the time of a conversion, and other threads run meanwhile.
    """
    halves = np.ascontiguousarray(values).view(np.uint16).reshape(*values.shape, 2)
    codes = _rounded_to_e4m3()[halves[..., 1] | (halves[..., 0] != 0)]
    return codes.view(numpy_dtype("F8_E4M3"))


@cache
def _rounded_to_e4m3() -> Array:
    """The code of the nearest e4m3 number by a float32's first half, odd where more follows."""
    numbers = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore"):
        return numbers.view(np.float32).astype(numpy_dtype("F8_E4M3")).view(np.uint8)


def _quotients(rows: Array, scales: Array, block: BlockFP8) -> Array:
    """Float32 values of a row of blocks by their scales [..., blocks], in e4m3's range."""
    with np.errstate(over="ignore"):
        quotients: Array = rows / _spread(scales, rows, block)
    # A scale that was rounded down would push the largest value out of range.
    return np.clip(quotients, -LARGEST_E4M3, LARGEST_E4M3, out=quotients)


def _spread(scales: Array, rows: Array, block: BlockFP8) -> Array:
    """The scale of each column of one row of blocks, to be multiplied with the rows."""
    columns = np.arange(rows.shape[-1]) // block.columns
    return scales[..., None, columns]


def _largest_of_blocks(rows: Array, block: BlockFP8) -> Array:
    """The largest of the non-negative values of each block in one row of blocks."""
    starts = np.arange(0, rows.shape[-1], block.columns)
    largest: Array = np.maximum.reduceat(rows.max(axis=-2), starts, axis=-1)
    return largest
