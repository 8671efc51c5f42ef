"""Putting the features of images and videos where their tokens are."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron.bridge.errors import InputError


@dataclass(frozen=True)
class VisualInputs:
    """What the processor made of images and videos, as given to `Qwen3VLModel.forward`.

    Attributes:
        pixel_values: [patches, values per patch] of images; None without images.
        image_grid_thw: [n, 3], frames, rows and columns in patches; None without images.
        pixel_values_videos: [patches, values per patch] of videos; None without videos.
        video_grid_thw: [n, 3], frames, rows and columns in patches; None without videos.
    """

    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    pixel_values_videos: Tensor | None
    video_grid_thw: Tensor | None

    @classmethod
    def of(
        cls,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        pixel_values_videos: Tensor | None,
        video_grid_thw: Tensor | None,
    ) -> Self:
        """Take what a model is called with; no rows of pixels and grids are none of them."""

        def given(
            pixels: Tensor | None, grid: Tensor | None
        ) -> tuple[Tensor | None, Tensor | None]:
            both = isinstance(pixels, Tensor) and isinstance(grid, Tensor)
            nothing = both and not len(pixels) and not len(grid)  # type: ignore[arg-type]
            return (None, None) if nothing else (pixels, grid)

        return cls(
            *given(pixel_values, image_grid_thw), *given(pixel_values_videos, video_grid_thw)
        )

    def check(self, patch_values: int, spatial_merge_size: int) -> None:
        """Raise InputError if pixels and grids do not belong together."""
        for name, grid_name in (
            ("pixel_values", "image_grid_thw"),
            ("pixel_values_videos", "video_grid_thw"),
        ):
            pixels: Tensor | None = getattr(self, name)
            grid: Tensor | None = getattr(self, grid_name)
            if (pixels is None) != (grid is None):
                present, missing = (name, grid_name) if grid is None else (grid_name, name)
                raise InputError(f"{present} was given without {missing}: pass both or neither")
            if pixels is None or grid is None:
                continue
            for tensor_name, tensor in ((name, pixels), (grid_name, grid)):
                if not isinstance(tensor, Tensor):
                    raise InputError(
                        f"{tensor_name} is of type {type(tensor).__name__}, expected a tensor"
                    )
            if grid.ndim != 2 or grid.shape[1] != 3:
                raise InputError(f"{grid_name} has shape {list(grid.shape)}, expected [n, 3]")
            if grid.is_floating_point() or bool((grid < 1).any()):
                raise InputError(
                    f"{grid_name} is {grid.tolist()}, expected numbers of frames, rows and "
                    f"columns: integers from 1"
                )
            if bool((grid[:, 1:] % spatial_merge_size).any()):
                raise InputError(
                    f"{grid_name} has a side that is not a multiple of spatial_merge_size = "
                    f"{spatial_merge_size}: {grid.tolist()}"
                )
            expected = [int(grid.prod(-1).sum()), patch_values]
            if list(pixels.shape) != expected:
                raise InputError(
                    f"{name} has shape {list(pixels.shape)}, and {grid_name} asks for {expected}"
                )

    def joined(self) -> tuple[Tensor, Tensor] | None:
        """Pixels and grids of all images, then of all videos; None if there are neither."""
        pixels = [x for x in (self.pixel_values, self.pixel_values_videos) if x is not None]
        grids = [x for x in (self.image_grid_thw, self.video_grid_thw) if x is not None]
        return (torch.cat(pixels), torch.cat(grids)) if pixels else None

    def token_positions(
        self, input_ids: Tensor, image_token_id: int, video_token_id: int, spatial_merge_size: int
    ) -> tuple[Tensor, Tensor]:
        """Where the features of `joined()` belong: (sequence, batch) indexes, int64 [tokens] each.

        Raises:
            InputError: the number of placeholder tokens is not the number of features.
        """
        positions = []
        for name, token_id, grid in (
            ("image", image_token_id, self.image_grid_thw),
            ("video", video_token_id, self.video_grid_thw),
        ):
            found = (input_ids == token_id).nonzero()
            features = 0 if grid is None else int(grid.prod(-1).sum()) // spatial_merge_size**2
            if found.shape[0] != features:
                raise InputError(
                    f"input_ids has {found.shape[0]} {name} tokens (id {token_id}), and the "
                    f"{name}s give {features} features. Check that the prompt was not truncated "
                    f"and that all {name}s of the batch were passed."
                )
            positions.append(found)
        batch, sequence = torch.cat(positions).unbind(1)
        return sequence, batch


def place(features: Tensor, into: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """A copy of `into` [s, b, h] with features [tokens, h] at the (sequence, batch) positions."""
    return into.index_put(positions, features.to(into.dtype))


def deepstack_context(
    deepstack: list[Tensor], like: Tensor, positions: tuple[Tensor, Tensor]
) -> Tensor | None:
    """The context of `DeepstackTransformerLayer`, [s, len(deepstack), b, h]; None without any.

    Args:
        deepstack: features [tokens, h], one per decoder layer that takes them.
        like: embeddings [s, b, h].
        positions: (sequence, batch) indexes of the features.
    """
    if not deepstack:
        return None
    nothing = torch.zeros_like(like)
    return torch.stack([place(features, nothing, positions) for features in deepstack], dim=1)
