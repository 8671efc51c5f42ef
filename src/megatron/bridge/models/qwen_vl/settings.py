"""From a config.json to the fields of a provider, as plain values."""

from typing import Any

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig

_DTYPES = {name: torch_name for torch_name, name in TORCH_NAMES.items()}
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
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def qwen_vl_settings(config: HFConfig, dtype: str) -> dict[str, Any]:
    """Provider fields of a dense Qwen vision-language model whose weights are in `dtype` ("BF16").

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
    attention_bias = text.get("attention_bias", False)
    return {
        "num_layers": text.require("num_hidden_layers", int),
        "hidden_size": text.require("hidden_size", int),
        "ffn_hidden_size": text.require("intermediate_size", int),
        "num_attention_heads": text.require("num_attention_heads", int),
        "num_query_groups": text.require("num_key_value_heads", int),
        "kv_channels": text.require("head_dim", int),
        "layernorm_epsilon": text.require("rms_norm_eps", float),
        "add_qkv_bias": attention_bias,
        "add_attention_output_bias": attention_bias,
        "vocab_size": text.require("vocab_size", int),
        "seq_length": text.require("max_position_embeddings", int),
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings", False),
        "rotary_base": rope.theta,
        "rotary_percent": rope.partial_rotary_factor,
        "mrope_section": list(rope.mrope_section),
        **{token: config.require(token, int) for token in _TOKENS},
        "params_dtype": _DTYPES[dtype],
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "vision": {
            **{field: vision.require(field, int) for field in _VISION_FIELDS},
            "hidden_act": vision.require("hidden_act", str),
            "deepstack_visual_indexes": vision.get("deepstack_visual_indexes", []),
        },
    }


def _require_only(config: HFConfig, name: str, only: object, found: object) -> None:
    if found != only:
        raise ConfigError(
            f"{config.origin}: {name} is {found!r}; the Megatron model implements {only!r} only"
        )
