"""Llama, a family that the package does not know: what a newcomer writes, and nothing else.

docs/howto/add-a-family.md goes through this file; `test_fifth_family.py` runs every command on it.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.backends.layer_spec import layer_spec
from megatron.bridge.models.backends.selection import get_backend
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
from megatron.bridge.models.conversion.structure import (
    LanguageFields,
    ModelStructure,
    padded_vocabulary,
)
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.small_model import SmallModel, register_small_models
from megatron.bridge.runtime.cpu import megatron_on_cpu

# --- The bridge ----------------------------------------------------------------------------------

MEGATRON, HF = "decoder.layers.*.", "model.layers.*."


@MegatronModelBridge.register_bridge(
    source="LlamaForCausalLM",
    target="megatron.core.models.gpt.gpt_model.GPTModel",
    provider=f"{__name__}.LlamaProvider",
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
        padded = padded_vocabulary(vocabulary, options.padded_vocab_size)
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
            **self.dtype_settings(config, dtype),
            "layernorm_epsilon": config.positive("rms_norm_eps"),
            "rotary_base": rope["rope_theta"],
            "share_embeddings_and_output_weights": config.require("tie_word_embeddings", bool),
        }


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
ONLY = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "rope_type": "default",
}

# --- A small model, for make-model ---------------------------------------------------------------

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

# --- The provider --------------------------------------------------------------------------------


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
