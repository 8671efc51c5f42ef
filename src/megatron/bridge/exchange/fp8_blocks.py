"""FP8 by block where the values are: on any device, and of a part of a tensor that cuts blocks.

The scale of a block is its largest magnitude / 448, the largest number of e4m3, rounded to the
dtype of scales; the values are divided by that. A part knows of a block only what lies in it: the
largest magnitude is that of all parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from megatron.bridge.models.hf_pretrained.quantization import LARGEST_E4M3, BlockFP8

_AT_ONCE = 1 << 20
"""Values that are computed together: of 4 MiB in float32."""


class _Rows(NamedTuple):
    """Rows of a matrix that are computed together, and the row of blocks that they begin in."""

    rows: slice
    block: int
    above: int
    """Rows of that block that lie above them."""


def largest_of_blocks(
    values: torch.Tensor, block: BlockFP8, first: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """The largest magnitude of each block that a part of a tensor touches; NaN where one is.

    Args:
        values: [..., rows, columns].
        block: extents of a block.
        first: row and column of the first value inside of its block.

    Returns:
        float32 [..., blocks of rows, blocks of columns].
    """
    *leading, rows, columns = values.shape
    shape = block.scale_shape((*leading, first[0] + rows, first[1] + columns))
    largest = torch.zeros(shape, dtype=torch.float32, device=values.device)
    right = -(first[1] + columns) % block.columns
    for index in product(*map(range, leading)):
        for part in _parts(rows, columns, block, first[0]):
            some = values[index][part.rows]
            padding = first[1], right, part.above, -(part.above + len(some)) % block.rows
            if any(padding):
                some = torch.nn.functional.pad(some, padding)
            blocks = some.unflatten(1, (-1, block.columns)).unflatten(0, (-1, block.rows))
            most = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))
            largest[index][part.block : part.block + len(most)] = most
    return largest


def scales_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scales of blocks by their largest magnitudes, in the dtype of scales; 1 for zeros."""
    # A number that is no tensor would be turned into its reciprocal on some devices.
    scales = (largest / torch.tensor(LARGEST_E4M3, device=largest.device)).to(dtype)
    scales[scales == 0] = 1
    return scales


def quantize_to(
    out: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    block: BlockFP8,
    first: tuple[int, int] = (0, 0),
) -> None:
    """Fill memory with a part of a tensor as e4m3, divided by the scales of its blocks.

    Args:
        out: e4m3, of the shape of the part, in any strides.
        values: [..., rows, columns].
        scales: of the blocks that the part touches, [..., blocks of rows, blocks of columns].
        block: extents of a block.
        first: row and column of the first value inside of its block.
    """
    *leading, rows, columns = values.shape
    row, column = (
        torch.arange(start, start + count, device=values.device) // size
        for start, count, size in zip(
            first, (rows, columns), (block.rows, block.columns), strict=True
        )
    )
    for index in product(*map(range, leading)):
        wide = scales[index].float()[:, column]
        for part in _parts(rows, columns, block, first[0]):
            quotients = values[index][part.rows].float() / wide[row[part.rows]]
            # A scale that was rounded down would push the largest value out of range.
            out[index][part.rows] = quotients.clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(out.dtype)


def _parts(rows: int, columns: int, block: BlockFP8, first: int) -> Iterator[_Rows]:
    step = max(1, _AT_ONCE // max(1, block.rows * columns)) * block.rows
    for edge in range(-first, rows, step):
        above = max(0, -edge)
        yield _Rows(
            slice(edge + above, min(edge + step, rows)), (edge + first) // block.rows, above
        )
