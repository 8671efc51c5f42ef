"""The parts of the vision encoder: patch embedding, mergers, and the stack of blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron.bridge.models.backends.layer_spec import layer_spec
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_config import VisionConfig


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel is as large as its stride, of patches that are cut out already."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[patches, channels * frames * height * width] -> [patches, h], in the weight's dtype."""
        return F.linear(pixel_values.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Every patch to a vector."""

    def __init__(self, vision: VisionConfig, config: TransformerConfig) -> None:
        super().__init__()
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = PatchProjection(
            vision.in_channels,
            vision.hidden_size,
            kernel_size=kernel,
            stride=kernel,
            dtype=config.params_dtype,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[patches, channels * frames * height * width] -> [patches, h]."""
        projected: Tensor = self.proj(pixel_values)
        return projected


class PatchMerger(MegatronModule):
    """The patches of one language token to its vector: norm, then a two-layer MLP.

    Args:
        vision: shape of the encoder.
        config: megatron-core config of the encoder.
        backend: supplies norm and linears.
        tp_group: tensor-parallel ranks.
        norm_after_merge: normalize the patches of a token together (deepstack) or each by itself.
    """

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        tp_group: torch.distributed.ProcessGroup,
        *,
        norm_after_merge: bool,
    ) -> None:
        super().__init__(config=config)
        merged = vision.merged_hidden_size
        self.norm_size = merged if norm_after_merge else vision.hidden_size
        self.merged_size = merged
        self.patch_norm = backend.layer_norm()(
            config=config, hidden_size=self.norm_size, eps=config.layernorm_epsilon
        )
        self.linear_fc1 = backend.column_parallel_linear()(
            merged,
            merged,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=tp_group,
        )
        self.linear_fc2 = backend.row_parallel_linear()(
            merged,
            vision.out_hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[patches, 1, h] -> [tokens, out_hidden_size]."""
        normalized = self.patch_norm(hidden_states.reshape(-1, self.norm_size))
        intermediate, _ = self.linear_fc1(normalized.view(-1, self.merged_size))
        output, _ = self.linear_fc2(F.gelu(intermediate))
        return output


class PatchMergerList(nn.ModuleList):
    """A ModuleList whose members keep their own sharding in checkpoints."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The states of all members; megatron-core takes a module without this for replicated."""
        sharded: ShardedStateDict = {}
        for name, merger in self.named_children():
            sharded |= sharded_state_dict_default(
                merger, f"{prefix}{name}.", sharded_offsets, metadata
            )
        return sharded


class VisionTransformerBlock(TransformerBlock):
    """The blocks of the encoder, with a merger at each deepstack tap."""

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        layer = layer_spec(config, backend, AttnMaskType.no_mask)
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.taps = vision.deepstack_visual_indexes
        if self.taps:
            self.deepstack_merger_list = PatchMergerList(
                PatchMerger(vision, config, backend, pg_collection.tp, norm_after_merge=True)
                for _ in self.taps
            )

    def forward(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor, packed_seq_params: PackedSeqParams
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks.

        Args:
            hidden_states: [patches, 1, h].
            rotary_pos_emb: one angle per patch, [patches, 1, 1, head size].
            packed_seq_params: one sequence per frame.

        Returns:
            The last hidden states [patches, 1, h], and for each deepstack tap its merged features
            [tokens, out_hidden_size].
        """
        output = super().forward(
            hidden_states,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            extract_layer_indices=set(self.taps),
        )
        if not self.taps:
            return output, []
        hidden_states, tapped = output
        mergers = zip(self.deepstack_merger_list, tapped, strict=True)
        return hidden_states, [merger(features) for merger, features in mergers]
