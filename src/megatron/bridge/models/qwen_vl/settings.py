"""From a config.json to the fields of a provider, as plain values."""

from typing import Any

from megatron.bridge.dtypes import TORCH_NAME_OF
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.rows import DENSE_MLP
from megatron.bridge.models.qwen_vl.structure import (
    decoder_layers,
    deepstack_layers,
    expert_sizes,
    has_delta_net,
    has_experts,
    layer_patterns,
    mlp_kinds,
)

_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "in_channels",
    "spatial_merge_size",
    "out_hidden_size",
    "num_position_embeddings",
)
_DELTA_FIELDS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def qwen_vl_settings(config: HFConfig, dtype: str) -> dict[str, Any]:
    """Provider fields of a Qwen vision-language model whose weights are in `dtype` ("BF16").

    Raises ConfigError for a value that is missing, or that the Megatron model does not implement.
    """
    text, vision, rope = config.text, config.vision, config.rope()
    _require_only(config, "text_config.hidden_act", "silu", text.require("hidden_act", str))
    _require_only(config, "rope_type", "default", rope.rope_type)
    _require_only(config, "mrope_interleaved", True, rope.interleaved)
    dropout = text.get("attention_dropout", 0.0)
    _require_only(config, "text_config.attention_dropout", 0.0, dropout)
    if dtype not in ("F32", "BF16", "F16"):
        raise ConfigError(f"{config.origin}: weights in {dtype}; expected F32, BF16 or F16")
    if has_delta_net(text):
        gated = text.get("attn_output_gate", True)
        _require_only(config, "text_config.attn_output_gate", True, gated)
    attention_bias = text.get("attention_bias", False)
    return {
        "num_layers": text.count("num_hidden_layers"),
        "hidden_size": text.count("hidden_size"),
        **layer_patterns(text),
        **_mlp_settings(text),
        **_delta_net_settings(text),
        "num_attention_heads": text.count("num_attention_heads"),
        "num_query_groups": text.count("num_key_value_heads"),
        "kv_channels": text.count("head_dim"),
        "layernorm_epsilon": text.positive("rms_norm_eps"),
        "add_qkv_bias": attention_bias,
        "add_attention_output_bias": attention_bias,
        "vocab_size": text.count("vocab_size"),
        "seq_length": text.count("max_position_embeddings"),
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings", False),
        "rotary_base": rope.theta,
        "rotary_percent": rope.partial_rotary_factor,
        "mrope_section": list(rope.mrope_section),
        **{token: config.count(token, least=0) for token in _TOKENS},
        "params_dtype": TORCH_NAME_OF[dtype],
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "vision": {
            **{field: vision.count(field) for field in _VISION_FIELDS},
            "hidden_act": vision.require("hidden_act", str),
            "deepstack_visual_indexes": deepstack_layers(vision),
        },
    }


def _mlp_settings(text: HFConfig) -> dict[str, Any]:
    """Sizes of the MLPs, and of the experts where there are any."""
    if not has_experts(text):
        return {"ffn_hidden_size": text.count("intermediate_size")}
    experts = expert_sizes(text).experts
    settings: dict[str, Any] = {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": text.count("moe_intermediate_size"),
        "moe_router_topk": text.count("num_experts_per_tok", experts),
    }
    if mlp_kinds(text, decoder_layers(text))[DENSE_MLP]:
        settings["ffn_hidden_size"] = text.count("intermediate_size")
    elif text.has("intermediate_size"):
        settings["ffn_hidden_size"] = text.count("intermediate_size", least=0)  # of none
    if text.has("shared_expert_intermediate_size"):
        settings["moe_shared_expert_intermediate_size"] = text.count(
            "shared_expert_intermediate_size"
        )
    return settings


def _delta_net_settings(text: HFConfig) -> dict[str, Any]:
    """Sizes of the Gated DeltaNet."""
    if not has_delta_net(text):
        return {}
    return {field: text.count(field) for field in _DELTA_FIELDS}


def _require_only(config: HFConfig, name: str, only: object, found: object) -> None:
    if found != only:
        raise ConfigError(
            f"{config.origin}: {name} is {found!r}; the Megatron model implements {only!r} only"
        )
