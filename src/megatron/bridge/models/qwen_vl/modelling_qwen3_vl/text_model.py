"""The language model: megatron-core's GPTModel with interleaved mRoPE and deepstack layers."""

from typing import TYPE_CHECKING

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron.bridge.models.backends.layer_spec import dense_layer_spec
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.deepstack import DeepstackTransformerLayer
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope import (
    InterleavedMultimodalRotaryEmbedding,
)

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider

IGNORED_LABEL = -100


class Qwen3VLTextModel(GPTModel):
    """GPTModel of a finalized provider.

    Args:
        config: the provider.
        pre_process: this stage holds the embedding.
        post_process: this stage holds the final norm and the output layer.
        pg_collection: process groups.
        vp_stage: virtual pipeline stage, None without interleaving.
    """

    def __init__(
        self,
        config: "Qwen3VLModelProvider",
        *,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            transformer_layer_spec=_block_spec(config, pg_collection, vp_stage),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            # Whether logits are gathered is decided call by call: the loss needs them split.
            parallel_output=True,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.unpadded_vocab_size = config.vocab_size
        self.rotary_pos_emb = InterleavedMultimodalRotaryEmbedding(
            config.kv_channels, config.rotary_percent, config.rotary_base
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy per token, over the real vocabulary.

        Args:
            labels: [b, s]; -100 marks tokens without a loss.
            logits: [s, b, v], v this tensor-parallel rank's part of the padded vocabulary.

        Returns:
            fp32 [b, s], zero where the label is -100.
        """
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        real = self.unpadded_vocab_size - first
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        ignored = labels == IGNORED_LABEL
        loss = super().compute_language_model_loss(labels.masked_fill(ignored, 0), logits)
        return loss.masked_fill(ignored, 0.0)


def _block_spec(
    config: "Qwen3VLModelProvider", pg_collection: ProcessGroupCollection, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage and the final norm."""
    backend: BackendSpecProvider = get_backend(config.transformer_impl)
    layer = dense_layer_spec(
        config,
        backend,
        AttnMaskType.causal,
        layer_class=DeepstackTransformerLayer,
        attention_output_bias=config.add_attention_output_bias,
    )
    layers = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
    return TransformerBlockSubmodules(
        layer_specs=[layer] * layers,
        layer_norm=backend.layer_norm(rms_norm=config.normalization == "RMSNorm"),
    )
