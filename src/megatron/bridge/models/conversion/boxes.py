"""Where scripts look for boxes; they are in `megatron.bridge.tensors.boxes`."""

from megatron.bridge.tensors.boxes import (
    Box,
    BoxIndex,
    absolute,
    blocks_of,
    box_shape,
    format_box,
    full_box,
    intersect,
    relative,
    row_blocks,
    slices,
    tiling_faults,
    volume,
)

__all__ = [
    "Box",
    "BoxIndex",
    "absolute",
    "blocks_of",
    "box_shape",
    "format_box",
    "full_box",
    "intersect",
    "relative",
    "row_blocks",
    "slices",
    "tiling_faults",
    "volume",
]
