"""Positions of tokens for mRoPE, as Qwen3-VL counts them.

Text advances all three axes by one per token. A visual token of a grid [h, w] (in language tokens)
at row r and column c, in a grid that starts at position p, is at (p, p + r, p + c), and the grid as
a whole advances the position by max(h, w). A video is a sequence of one-frame grids, since its
timestamps are text between the frames. Padding is skipped.
"""

from itertools import groupby

import torch
from torch import Tensor

from megatron.bridge.errors import InputError

TEXT, IMAGE, VIDEO = 0, 1, 2
_NAMES = {IMAGE: "image", VIDEO: "video"}


def token_types(input_ids: Tensor, image_token_id: int, video_token_id: int) -> Tensor:
    """0 for text, 1 for image, 2 for video tokens: what processors call mm_token_type_ids."""
    types = torch.zeros_like(input_ids)
    types[input_ids == image_token_id] = IMAGE
    types[input_ids == video_token_id] = VIDEO
    return types


def get_rope_index(
    types: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    attention_mask: Tensor | None,
    spatial_merge_size: int,
) -> Tensor:
    """Positions of a padded batch.

    Args:
        types: [b, s], see `token_types`.
        image_grid_thw: [images, 3] in patches, in the order of the tokens of the batch.
        video_grid_thw: [videos, 3], likewise.
        attention_mask: [b, s], nonzero for real tokens; None if all are real.
        spatial_merge_size: patches per language token along each side.

    Returns:
        int64 [3, b, s] on the device of `types`; padding is at 0.

    Raises:
        InputError: a run of visual tokens is not made of whole grids, a grid has no tokens, or an
            image has more than one frame.
    """
    grids = _merged_grids(image_grid_thw, video_grid_thw, spatial_merge_size)
    # One transfer from the device for the batch, and one back.
    positions = torch.zeros(3, *types.shape, dtype=torch.long, device="cpu")
    real = None if attention_mask is None else attention_mask.bool().cpu()
    for row, row_types in enumerate(types.cpu()):
        where = slice(None) if real is None else real[row]
        positions[:, row, where] = _sequence_positions(row_types[where].tolist(), grids)
    _nothing_left(grids)
    return positions.to(types.device)


def get_packed_rope_index(
    types: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    cu_seqlens: Tensor,
    spatial_merge_size: int,
) -> Tensor:
    """Positions of sequences packed one after the other; each starts at 0.

    Args:
        types: [1, t], see `token_types`.
        image_grid_thw: as for `get_rope_index`.
        video_grid_thw: as for `get_rope_index`.
        cu_seqlens: int [sequences + 1], where the sequences start and end.
        spatial_merge_size: as for `get_rope_index`.

    Returns:
        int64 [3, 1, t] on the device of `types`.

    Raises:
        InputError: a run of visual tokens is not made of whole grids, a grid has no tokens, or an
            image has more than one frame.
    """
    grids = _merged_grids(image_grid_thw, video_grid_thw, spatial_merge_size)
    lengths = cu_seqlens.diff().tolist()
    per_sequence = [
        _sequence_positions(sequence.tolist(), grids) for sequence in types[0].cpu().split(lengths)
    ]
    _nothing_left(grids)
    return torch.cat(per_sequence, dim=1)[:, None, :].to(types.device)


_Grids = dict[int, list[tuple[int, int]]]


def _merged_grids(image: Tensor | None, video: Tensor | None, merge: int) -> _Grids:
    """(rows, columns) in language tokens, in reverse order so that the next one is last."""
    images, frames = [], []
    for count, height, width in [] if image is None else image.tolist():
        if count != 1:
            raise InputError(f"image_grid_thw has an image of {count} frames: images have one")
        images.append((height // merge, width // merge))
    for count, height, width in [] if video is None else video.tolist():
        frames += [(height // merge, width // merge)] * count
    return {IMAGE: images[::-1], VIDEO: frames[::-1]}


def _sequence_positions(types: list[int], grids: _Grids) -> Tensor:
    """Positions [3, len(types)] of one sequence; takes its grids off `grids`."""
    pieces = [torch.zeros(3, 0, dtype=torch.long, device="cpu")]
    position = 0
    for kind, run in groupby(types):
        remaining = sum(1 for _ in run)
        if kind == TEXT:
            pieces.append(torch.arange(position, position + remaining, device="cpu").expand(3, -1))
            position += remaining
            continue
        while remaining:
            if not grids[kind] or grids[kind][-1][0] * grids[kind][-1][1] > remaining:
                raise InputError(
                    f"{remaining} consecutive {_NAMES[kind]} tokens remain, and "
                    f"{_next(grids[kind])}. Check {_NAMES[kind]}_grid_thw and truncation of the "
                    "prompt."
                )
            height, width = grids[kind].pop()
            pieces.append(_grid_positions(height, width) + position)
            position += max(height, width)
            remaining -= height * width
    return torch.cat(pieces, dim=1)


def _next(grids: list[tuple[int, int]]) -> str:
    if not grids:
        return "all grids are used up"
    return f"the next is a grid of {grids[-1]} tokens"


def _grid_positions(height: int, width: int) -> Tensor:
    """(0, row, column) of a one-frame grid, [3, height * width]."""
    row = torch.arange(height, device="cpu").repeat_interleave(width)
    column = torch.arange(width, device="cpu").repeat(height)
    return torch.stack((torch.zeros_like(row), row, column))


def _nothing_left(grids: _Grids) -> None:
    for kind, left in grids.items():
        if left:
            raise InputError(
                f"{len(left)} {_NAMES[kind]} grids have no tokens in the batch. Check "
                f"{_NAMES[kind]}_grid_thw and truncation of the prompt."
            )
