"""Where each patch is: the rotary angles and the learned position embedding of the encoder.

Patches come image by image (or video by video), frame by frame, and inside a frame in merge
order: block row, block column, row in the block, column in the block, where a block is the
`spatial_merge_size` square that becomes one language token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PatchPositions:
    """Row and column of every patch in its frame, and the size of that frame; int64 [patches]."""

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def patch_positions(grid_thw: Tensor, spatial_merge_size: int) -> PatchPositions:
    """Positions for grids [n, 3] of (frames, rows, columns) in patches, on their device."""
    device, merge = grid_thw.device, spatial_merge_size
    per_grid = []
    for frames, height, width in grid_thw.tolist():
        blocks = (height // merge, width // merge, merge, merge)
        row = torch.arange(height, device=device).view(-1, 1, merge, 1).expand(blocks).flatten()
        column = torch.arange(width, device=device).view(1, -1, 1, merge).expand(blocks).flatten()
        frame = torch.stack(
            (row, column, torch.full_like(row, height), torch.full_like(row, width))
        )
        per_grid.append(frame.repeat(1, frames))
    return PatchPositions(*torch.cat(per_grid, dim=1))


def rotary_angles(positions: PatchPositions, head_size: int, theta: float) -> Tensor:
    """Angles of the patches, fp32 [patches, 1, 1, head_size].

    Half of the frequencies turn with the row, half with the column, and all of them are repeated
    for the two halves of a head that the rotation swaps.
    """
    quarter = head_size // 4
    steps = torch.arange(quarter, dtype=torch.float32, device=positions.row.device)
    inv_freq = 1.0 / theta ** (2.0 * steps / (head_size // 2))
    by_row = positions.row[:, None] * inv_freq
    by_column = positions.column[:, None] * inv_freq
    return torch.cat((by_row, by_column, by_row, by_column), dim=-1)[:, None, None, :]


def interpolated_embedding(table: Tensor, positions: PatchPositions, grid_size: int) -> Tensor:
    """The learned table, a square grid, resampled bilinearly to the grid of each image.

    The corners of the image are the corners of the table. Accumulated in fp32.

    Args:
        table: [grid_size**2, h].
        positions: of all patches.
        grid_size: side of the table.

    Returns:
        fp32 [patches, h].
    """

    def taps(index: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source = index * (grid_size - 1) / (size - 1).clamp(min=1)
        low = source.long()
        return low, (low + 1).clamp(max=grid_size - 1), source - low

    top, bottom, down = taps(positions.row, positions.height)
    left, right, across = taps(positions.column, positions.width)
    corners = [
        F.embedding(row * grid_size + column, table) * (row_weight * column_weight)[:, None]
        for row, row_weight in ((top, 1 - down), (bottom, down))
        for column, column_weight in ((left, 1 - across), (right, across))
    ]
    return corners[0] + corners[1] + corners[2] + corners[3]


class InterpolatedEmbedding(nn.Embedding):
    """A learned table of grid_size**2 vectors, see `interpolated_embedding`."""

    def forward(self, positions: PatchPositions) -> Tensor:  # type: ignore[override]
        """fp32 [patches, h], for the positions of all patches."""
        return interpolated_embedding(self.weight, positions, math.isqrt(self.num_embeddings))
