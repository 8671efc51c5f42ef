"""Llama between Hugging Face and Megatron-Core."""

from typing import Any

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.config_values import dtype_settings, padded_vocabulary
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    MegatronModelBridge,
    PlanOptions,
    Tensors,
)
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    GatedMLPMapping,
    NormMapping,
    QKVMapping,
    RowParallelMapping,
)
from megatron.bridge.models.conversion.structure import LanguageFields, ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.small_model import SmallModel, register_small_models

MEGATRON, HF = "decoder.layers.*.", "model.layers.*."
COUNTS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
}
"""Fields of the provider, and the keys of config.json that they have their values from."""
ONLY = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "rope_type": "default",
}
"""What the provider builds; a config that says otherwise is refused."""


@MegatronModelBridge.register_bridge(
    source="LlamaForCausalLM",
    target="megatron.core.models.gpt.gpt_model.GPTModel",
    provider="fifth_provider.LlamaProvider",
    model_type="llama",
)
class LlamaBridge(MegatronModelBridge):
    """LlamaForCausalLM to and from GPTModel."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        attention, mlp = f"{MEGATRON}self_attention.", f"{MEGATRON}mlp."
        q, k, v, o = (f"{HF}self_attn.{name}_proj.weight" for name in "qkvo")
        gate, up, down = (f"{HF}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        norm, mlp_norm = f"{HF}input_layernorm.weight", f"{HF}post_attention_layernorm.weight"
        embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
        return MegatronMappingRegistry(
            ColumnParallelMapping(embedding, "model.embed_tokens.weight", "V H", vocabulary=True),
            ColumnParallelMapping(head, "lm_head.weight", "V H", vocabulary=True, only="untied"),
            NormMapping("decoder.final_layernorm.weight", "model.norm.weight", "H"),
            NormMapping(f"{attention}linear_qkv.layer_norm_weight", norm, "H"),
            QKVMapping(f"{attention}linear_qkv.weight", q, k, v, ("Q H", "K H")),
            RowParallelMapping(f"{attention}linear_proj.weight", o, "H Q"),
            NormMapping(f"{mlp}linear_fc1.layer_norm_weight", mlp_norm, "H"),
            GatedMLPMapping(f"{mlp}linear_fc1.weight", gate, up, "I H"),
            RowParallelMapping(f"{mlp}linear_fc2.weight", down, "H I"),
        )

    def structure(
        self, config: HFConfig, tensors: Tensors | None = None, options: PlanOptions = DEFAULTS
    ) -> ModelStructure:
        hidden, inner, vocabulary = map(
            config.count, ("hidden_size", "intermediate_size", "vocab_size")
        )
        heads, groups = map(config.count, ("num_attention_heads", "num_key_value_heads"))
        d = config.count("head_dim")
        padded = padded_vocabulary(config, options.padded_vocab_size)
        return ModelStructure(
            dims={"V": vocabulary, "H": hidden, "I": inner, "Q": heads * d, "K": groups * d},
            fields={"": LanguageFields(heads, groups, d, vocabulary, padded)},
            indices={"decoder.layers.": tuple(range(config.count("num_hidden_layers")))},
            stacked=frozenset({"decoder.layers."}),
            features=frozenset(() if config.require("tie_word_embeddings", bool) else {"untied"}),
        )

    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        # As transformers completes it, whichever form the file has.
        rope = config.completed("rope_parameters") or config.require("rope_parameters", dict)
        stated = {key: config.require_any(key) for key in ONLY if key != "rope_type"} | rope
        for key, only in ONLY.items():
            if stated[key] != only:
                raise ConfigError(
                    f"{config.origin}: {key} is {stated[key]!r}; only {only!r} can be converted"
                )
        return {
            **{field: config.count(key) for field, key in COUNTS.items()},
            **dtype_settings(config, dtype),
            "layernorm_epsilon": config.positive("rms_norm_eps"),
            "rotary_base": rope["rope_theta"],
            "share_embeddings_and_output_weights": config.require("tie_word_embeddings", bool),
        }


register_small_models(
    SmallModel(
        name="llama",
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": 16,
            "hidden_size": 84,
            "intermediate_size": 136,
            "max_position_embeddings": 2048,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "vocab_size": 307,
        },
        tokens=("<|begin_of_text|>", "<|end_of_text|>"),
        token_ids={"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|end_of_text|>"},
        end_tokens=("<|end_of_text|>",),
        tokenizer_class="GPT2Tokenizer",
    )
)
