"""Builds Llama of megatron-core's own parts."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType

from megatron.bridge.models.backends.layer_spec import layer_spec
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.runtime.cpu import megatron_on_cpu


@dataclass
class LlamaProvider(ModelProvider):
    """Builds stock GPTModel."""

    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    activation_func: Any = F.silu
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    rotary_base: float = 10_000.0

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        self.finalize()
        backend = get_backend(self.transformer_impl)
        with megatron_on_cpu():
            first, last = self.stage_ends(pre_process, post_process, vp_stage)
            return GPTModel(
                self,
                layer_spec(self, backend, AttnMaskType.causal),
                vocab_size=self.padded_vocab_size,
                max_sequence_length=self.seq_length,
                pre_process=first,
                post_process=last,
                parallel_output=self.parallel_output,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_base=self.rotary_base,
                vp_stage=vp_stage,
            )
