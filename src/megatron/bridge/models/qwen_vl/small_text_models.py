"""What the released models of text alone look like, at a size for tests."""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.qwen_vl.small_language import (
    DENSE_CONFIG,
    HYBRID_ATTENTION_CONFIG,
    MOE_CONFIG,
    QWEN3_MOE_CONFIG,
    SHARED_EXPERT_CONFIG,
    TEXT_CONFIG,
    small_model,
)
from megatron.bridge.models.small_model import SmallModel, register_small_models

_ATTENTION = {
    "head_dim": 32,
    "num_attention_heads": 8,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "use_sliding_window": False,
}


def _family(
    name: str, architecture: str, model_type: str, *parts: dict[str, Any], **fields: Any
) -> SmallModel:
    """The declaration of a family, with what all of them have in common."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
    }
    for part in (TEXT_CONFIG, *parts):
        config |= part
    return small_model(name, config, "", "model", **fields)


_NO_WINDOW = ("sliding_window", "use_sliding_window")

register_small_models(
    _family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        _ATTENTION,
        DENSE_CONFIG,
        {"max_window_layers": 5, "num_hidden_layers": 5},
        fixed=_NO_WINDOW,
    ),
    _family(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _ATTENTION,
        QWEN3_MOE_CONFIG,
        fixed=_NO_WINDOW,
        options={"experts": "per-expert"},
    ),
    _family(
        "qwen3.5-text",
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        HYBRID_ATTENTION_CONFIG,
        DENSE_CONFIG,
        {"num_hidden_layers": 6},
        hybrid=True,
    ),
    _family(
        "qwen3.5-moe-text",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        HYBRID_ATTENTION_CONFIG,
        MOE_CONFIG,
        SHARED_EXPERT_CONFIG,
        {"num_hidden_layers": 7},
        hybrid=True,
        fixed=("mlp_only_layers",),
        options={"experts": "fused", "mtp_experts": "fused"},
        expert_options={"mtp.": "mtp_experts"},
        fp8_options={"experts": "per-expert", "mtp_experts": "per-expert"},
    ),
)
