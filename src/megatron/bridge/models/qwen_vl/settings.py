"""From a config.json to the fields of a provider, as plain values."""

from typing import Any

from megatron.bridge.dtypes import MIXABLE, TORCH_NAME_OF
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import field_settings, is_read
from megatron.bridge.models.qwen_vl.rope_config import read_rope, vision_rope_settings
from megatron.bridge.models.qwen_vl.rows import DENSE_MLP
from megatron.bridge.models.qwen_vl.structure import (
    decoder_layers,
    deepstack_layers,
    expert_sizes,
    has_experts,
    layer_patterns,
    mlp_kinds,
)


def qwen_vl_settings(config: HFConfig, dtype: str) -> dict[str, Any]:
    """Provider fields of a Qwen vision-language model whose weights are in `dtype` ("BF16").

    What the Megatron model cannot compute is refused when it is built: a conversion of files does
    not depend on it. Raises ConfigError for a value that makes no sense.
    """
    if dtype not in MIXABLE:
        raise ConfigError(f"{config.origin}: weights in {dtype}; expected {', '.join(MIXABLE)}")
    text, vision, rope = config.text, config.vision, read_rope(config)
    return {
        "num_layers": text.count("num_hidden_layers"),
        **field_settings(text, "text_config"),
        **layer_patterns(text),
        **_mlp_settings(text),
        **field_settings(config, ""),
        "rotary_base": rope.theta,
        "rotary_percent": rope.partial_rotary_factor,
        "mrope_section": list(rope.mrope_section),
        "rope_parameters": {"rope_type": rope.rope_type, **rope.scaling},
        "params_dtype": TORCH_NAME_OF[dtype],
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "vision": {
            **field_settings(vision, "vision_config"),
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
    if mlp_kinds(text, decoder_layers(text))[DENSE_MLP]:
        settings["ffn_hidden_size"] = text.count("intermediate_size")
    elif is_read(text, "text_config", "intermediate_size") and text.has("intermediate_size"):
        settings["ffn_hidden_size"] = text.count("intermediate_size", least=0)  # of none
    return settings
