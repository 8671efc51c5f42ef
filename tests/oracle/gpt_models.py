"""megatron-core's own GPTModel, built of its own layer spec, for configs of Qwen3 text models."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def stock_gpt_model(folder: Path, **fields: Any) -> Any:
    """This rank's part of the model of a folder, in bfloat16, with weights that mean nothing.

    Args:
        folder: with a config.json, whose section of text is what counts.
        fields: of the TransformerConfig, parallel sizes among them.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.models.hf_pretrained.config import HFConfig
    from megatron.bridge.runtime.cpu import megatron_on_cpu
    from megatron.bridge.runtime.parallel import initialize_process_groups
    from megatron.bridge.runtime.parallel_sizes import ParallelSizes

    sizes = ParallelSizes(
        tp=fields.get("tensor_model_parallel_size", 1),
        pp=fields.get("pipeline_model_parallel_size", 1),
        ep=fields.get("expert_model_parallel_size", 1),
    )
    initialize_process_groups(sizes)
    top = HFConfig.from_file(folder)
    text = top.text if top.has("text_config") else top
    experts = text.require("num_experts", int) if text.has("num_experts") else None
    if experts:
        fields |= {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": text.require("moe_intermediate_size", int),
        }
    with megatron_on_cpu():
        config = TransformerConfig(
            num_layers=text.require("num_hidden_layers", int),
            hidden_size=text.require("hidden_size", int),
            ffn_hidden_size=text.require("intermediate_size", int),
            num_attention_heads=text.require("num_attention_heads", int),
            num_query_groups=text.require("num_key_value_heads", int),
            kv_channels=text.require("head_dim", int),
            normalization="RMSNorm",
            qk_layernorm=True,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            use_cpu_initialization=not torch.cuda.is_available(),
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            **fields,
        )
        return GPTModel(
            config,
            get_gpt_layer_local_spec(
                num_experts=experts, qk_layernorm=True, normalization="RMSNorm"
            ),
            vocab_size=384,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=top.require("tie_word_embeddings", bool),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ).bfloat16()
