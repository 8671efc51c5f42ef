"""From a config.json to the fields of a provider, as plain values."""

from dataclasses import asdict
from typing import Any

from megatron.bridge.models.conversion.config_values import dtype_settings
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import field_settings, is_read, language_of
from megatron.bridge.models.qwen_vl.config_layers import (
    decoder_layers,
    deepstack_layers,
    expert_sizes,
    has_experts,
    layer_patterns,
    mlp_kinds,
)
from megatron.bridge.models.qwen_vl.heads import scores_of
from megatron.bridge.models.qwen_vl.parts import DENSE_MLP
from megatron.bridge.models.qwen_vl.rope_config import read_rope, vision_rope_settings


def language_settings(config: HFConfig, dtype: str) -> dict[str, Any]:
    """Provider fields of a language model.

    What the Megatron model cannot compute is refused when it is built: a conversion of files does
    not depend on it.

    Args:
        config: config of the whole model.
        dtype: dtype of the weights ("BF16").

    Raises:
        ConfigError: a value makes no sense.
    """
    of_dtype = dtype_settings(config, dtype)
    text, rope = language_of(config), read_rope(config)
    settings = {
        "num_layers": text.count("num_hidden_layers"),
        **field_settings(text),
        **layer_patterns(text),
        **_mlp_settings(text),
        **_window_settings(text),
        **field_settings(config),
        "rotary_base": rope.theta,
        "rotary_percent": rope.partial_rotary_factor,
        "rope_parameters": {"rope_type": rope.rope_type, **rope.scaling},
        **of_dtype,
    }
    # A token that has one position turns all frequencies with it.
    one_position = [settings["kv_channels"] // 2, 0, 0]
    settings["mrope_section"] = list(rope.mrope_section) or one_position
    if scores := scores_of(config):
        settings |= {"scores": asdict(scores), "share_embeddings_and_output_weights": False}
    return settings


def vision_settings(config: HFConfig) -> dict[str, Any]:
    """Provider fields of the vision tower. Raises ConfigError for a value that makes no sense."""
    vision = config.vision
    return {
        "vision": {
            **field_settings(vision),
            "deepstack_visual_indexes": deepstack_layers(vision),
            **vision_rope_settings(vision),
        },
    }


def _mlp_settings(text: HFConfig) -> dict[str, Any]:
    """Sizes of the MLPs, and of the experts where there are any."""
    if not has_experts(text):
        return {"ffn_hidden_size": text.count("intermediate_size")}
    experts = expert_sizes(text).experts
    settings: dict[str, Any] = {
        "num_moe_experts": experts,
        "moe_router_topk": text.count("num_experts_per_tok", experts),
        # The loss over all routers, which transformers has where the config asks for them.
        "moe_aux_loss_coeff": 0.0,
        "router_aux_loss_coef": (
            text.positive("router_aux_loss_coef", least=0.0)
            if text.require("output_router_logits", bool)
            else 0.0
        ),
    }
    if is_read(text, "norm_topk_prob"):
        settings["moe_router_pre_softmax"] = not text.require("norm_topk_prob", bool)
    if mlp_kinds(text, decoder_layers(text))[DENSE_MLP]:
        settings["ffn_hidden_size"] = text.count("intermediate_size")
    elif is_read(text, "intermediate_size") and text.has("intermediate_size"):
        settings["ffn_hidden_size"] = text.count("intermediate_size", least=0)  # of none
    return settings


def _window_settings(text: HFConfig) -> dict[str, Any]:
    """How far back attention sees, where it does not see everything; megatron-core's fields.

    In transformers the window is used where `use_sliding_window` is set: by the layers that
    `layer_types` names, and without that list by those from `max_window_layers` on; in a mixture of
    experts by all.
    """
    if not is_read(text, "use_sliding_window") or not text.require("use_sliding_window", bool):
        return {}
    layers = [True] * text.count("num_hidden_layers")
    if is_read(text, "layer_types"):
        layers = [kind == "sliding_attention" for kind in text.list_of("layer_types", str)]
    if not any(layers):
        return {}
    return {"window_size": [text.count("sliding_window") - 1, 0]}
