"""The vision encoder: patches of images and videos to vectors of the language model."""

import copy

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.backends.sequence_parts import OneRank
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_block import (
    PatchEmbed,
    PatchMerger,
    VisionTransformerBlock,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_config import VisionConfig
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_positions import (
    InterpolatedEmbedding,
    patch_positions,
    rotary_angles,
)


class Qwen3VLVisionModel(MegatronModule):
    """Patch embedding, transformer blocks with one attention segment per frame, mergers.

    Args:
        vision: shape of the encoder.
        config: its megatron-core config, `vision.to_transformer_config(...)`.
        pg_collection: process groups.
    """

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.vision = vision
        if pg_collection.cp.size() > 1:
            # Every context-parallel rank encodes all pictures, whose sequences are not cut.
            pg_collection = copy.copy(pg_collection)
            pg_collection.cp = OneRank()
        backend = get_backend(config.transformer_impl)
        self.patch_embed = PatchEmbed(vision, config)
        self.pos_embed = InterpolatedEmbedding(
            vision.num_position_embeddings, vision.hidden_size, dtype=config.params_dtype
        )
        self.decoder = VisionTransformerBlock(vision, config, backend, pg_collection)
        self.merger = PatchMerger(vision, config, backend, pg_collection.tp, norm_after_merge=False)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode images and videos.

        Args:
            pixel_values: [patches, channels * frames * height * width], in merge order.
            grid_thw: int64 [n, 3], frames, rows and columns in patches of each image or video.

        Returns:
            Features [tokens, out_hidden_size], and the deepstack features of the same shape, one
            per entry of `deepstack_visual_indexes`.
        """
        grid_thw = grid_thw.to(pixel_values.device)
        positions = patch_positions(grid_thw, self.vision.spatial_merge_size)
        hidden_states = self.patch_embed(pixel_values)
        hidden_states = hidden_states + self.pos_embed(positions).to(hidden_states.dtype)
        head_size = self.vision.hidden_size // self.vision.num_heads
        hidden_states, deepstack = self.decoder(
            hidden_states[:, None, :].contiguous(),
            rotary_angles(positions, head_size, self.vision.rope_theta),
            _one_sequence_per_frame(grid_thw),
        )
        return self.merger(hidden_states), deepstack

    @property
    def is_trained(self) -> bool:
        """Whether any parameter is to have a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def nothing(self, device: torch.device) -> Tensor:
        """A zero that depends on every parameter, for a batch without pictures.

        Data parallelism waits for the gradient of each parameter, and other ranks have pictures.
        """
        side = self.vision.spatial_merge_size
        pixels = torch.zeros(side * side, self.vision.patch_values, device=device)
        features, deepstack = self(pixels, torch.tensor([[1, side, side]], device=device))
        return (0.0 * torch.stack([features, *deepstack])).sum()


def _one_sequence_per_frame(grid_thw: Tensor) -> PackedSeqParams:
    """Patches attend to the patches of their own frame only."""
    lengths = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
    boundaries = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
