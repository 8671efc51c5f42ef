"""From a config.json to the fields of a provider, as plain values."""

from typing import Any

from megatron.bridge.dtypes import TORCH_NAME_OF
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.rows import LINEAR_ATTENTION, SPARSE_MLP
from megatron.bridge.models.qwen_vl.structure import (
    attention_kinds,
    decoder_layers,
    deepstack_layers,
    expert_sizes,
    has_delta_net,
    has_experts,
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
    if dtype not in ("F32", "BF16", "F16"):
        raise ConfigError(f"{config.origin}: weights in {dtype}; expected F32, BF16 or F16")
    attention_bias = text.get("attention_bias", False)
    return {
        "num_layers": text.count("num_hidden_layers"),
        "hidden_size": text.count("hidden_size"),
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
        "rope_parameters": _rope_parameters(text),
        "hidden_act": text.get("hidden_act", "silu"),
        "attention_dropout": text.get("attention_dropout", 0.0),
        "init_method_std": text.get("initializer_range", 0.02),
        **{token: config.count(token, least=0) for token in _TOKENS},
        "params_dtype": TORCH_NAME_OF[dtype],
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "vision": {
            **{field: vision.count(field) for field in _VISION_FIELDS},
            "hidden_act": vision.require("hidden_act", str),
            "initializer_range": vision.get("initializer_range", 0.02),
            **_axial_rope(vision),
            "deepstack_visual_indexes": deepstack_layers(vision),
        },
    }


def _rope_parameters(text: HFConfig) -> dict[str, Any]:
    """The text model's rope_parameters, with what transformers' standardization adds."""
    form = "rope_parameters" if text.has("rope_parameters") else "rope_scaling"
    parameters: dict[str, Any] = text.require(form, dict)
    if parameters.get("rope_type") in ("llama3", "yarn", "longrope"):
        length = text.count("max_position_embeddings")
        parameters.setdefault("original_max_position_embeddings", length)
    return parameters


def _axial_rope(vision: HFConfig) -> dict[str, Any]:
    rope_type = vision.get("rope_parameters.rope_type", "axial")
    return {
        "rope_theta": vision.get("rope_parameters.rope_theta", 10000.0),
        "rope_type": "axial" if rope_type == "default" else rope_type,
    }


def _mlp_settings(text: HFConfig) -> dict[str, Any]:
    """Sizes of the MLPs, and of the experts where there are any."""
    if not has_experts(text):
        return {"ffn_hidden_size": text.count("intermediate_size")}
    layers = decoder_layers(text)
    sparse = mlp_kinds(text, layers)[SPARSE_MLP]
    experts = expert_sizes(text).experts
    settings: dict[str, Any] = {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": text.count("moe_intermediate_size"),
        "moe_router_topk": text.count("num_experts_per_tok", experts),
        "moe_layer_freq": 1,
        "moe_aux_loss_coeff": 0.0,
        "router_aux_loss_coef": 0.0,
    }
    if text.get("output_router_logits", False):
        settings["router_aux_loss_coef"] = text.get("router_aux_loss_coef", 0.001)
    if len(sparse) < len(layers):
        settings["moe_layer_freq"] = [int(layer in sparse) for layer in layers]
        settings["ffn_hidden_size"] = text.count("intermediate_size")
    elif text.has("intermediate_size"):
        settings["ffn_hidden_size"] = text.count("intermediate_size", least=0)  # of none
    if text.has("shared_expert_intermediate_size"):
        settings["moe_shared_expert_intermediate_size"] = text.count(
            "shared_expert_intermediate_size"
        )
    return settings


def _delta_net_settings(text: HFConfig) -> dict[str, Any]:
    """Sizes of the Gated DeltaNet, and which layers have it: 1 in `linear_attention_freq`."""
    if not has_delta_net(text):
        return {}
    layers = decoder_layers(text)
    linear = attention_kinds(text, layers)[LINEAR_ATTENTION]
    return {
        "linear_attention_freq": [int(layer in linear) for layer in layers],
        **{field: text.count(field) for field in _DELTA_FIELDS},
    }
