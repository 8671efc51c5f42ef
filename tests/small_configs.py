"""A small config of each family, and another value for every key that it can have."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import DEFAULTS
from megatron.bridge.models.hf_pretrained.config import HFConfig
from oracle import text_models, tiny

type Key = tuple[str, str]
"""A section of the config, "" for none, and a key of it."""

WITH_VISION = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
ALONE = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
"""Model types of text alone, whose configs have no sections."""
FAMILIES = (*WITH_VISION, *ALONE)
LINEAR, FULL = "linear_attention", "full_attention"

# Another value than that of the small configs below, for every key that the table has.
OTHERS: dict[str, Any] = {
    "architectures": None,  # looked at by a test of its own
    "text_config": None,
    "vision_config": None,
    "quantization_config": None,
    "model_type": None,
    "dtype": "float16",
    "torch_dtype": "float16",
    "per_layer_config": {"1": {"hidden_size": 24}},
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "tie_last_hidden_states": True,
    "use_cache": False,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "id2label": {"0": "no", "1": "yes", "2": "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 7,
    "transformers_version": "4.57.0",
    "name_or_path": "somewhere",
    "_commit_hash": "abc",
    "chunk_size_feed_forward": 3,
    "is_encoder_decoder": False,
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
    "tie_word_embeddings": True,
    "rope_theta": 123.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [4, 2, 2]},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0},
    "partial_rotary_factor": 0.5,
    "vocab_size": 311,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 4,
    "intermediate_size": 150,
    "hidden_act": "gelu",
    "attention_dropout": 0.25,
    "initializer_range": 0.5,
    "rms_norm_eps": 0.25,
    "attention_bias": True,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 26,
    "shared_expert_intermediate_size": 38,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "sliding_window": 3,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "layer_types": [FULL, LINEAR, LINEAR, FULL, FULL],
    "full_attention_interval": 2,
    "attn_output_gate": False,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": True,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 56,
    "linear_value_head_dim": 44,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 6,
    "depth": 3,
    "num_heads": 6,
    "patch_size": 14,
    "temporal_patch_size": 3,
    "in_channels": 4,
    "spatial_merge_size": 3,
    "out_hidden_size": 88,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
}


WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def small(model_type: str) -> dict[str, Any]:
    """A config that states every key that a small model needs."""
    if model_type in ALONE:
        _, entries = text_models.MODELS[ALONE[model_type]]
        config = copy.deepcopy(entries) | {"model_type": model_type, "dtype": "float32"}
        return config | {"architectures": [ALONE[model_type]]}
    _, text, deepstack = tiny.FAMILIES[model_type]
    config = {
        "architectures": [
            f"{tiny.FAMILIES[model_type][0]}ForConditionalGeneration",
        ],
        "model_type": model_type,
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "text_config": copy.deepcopy(tiny.TEXT | text),
        "vision_config": {
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_heads": 3,
            "patch_size": 16,
            "out_hidden_size": 80,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": deepstack,
        },
    }
    config["text_config"]["dtype"] = "float32"
    return config


def changed(model_type: str, section: str, key: str) -> dict[str, Any]:
    """The small config with another value of one key, and what has to follow it."""
    config = small(model_type)
    target = config[section] if section else config
    target[key] = copy.deepcopy(OTHERS[key])
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    if section == "text_config" and key == "hidden_size":
        vision["out_hidden_size"] = OTHERS["hidden_size"]
    if key == "out_hidden_size":
        text["hidden_size"] = OTHERS[key]
    if key in ("full_attention_interval", "num_hidden_layers"):
        target.pop("layer_types", None)
    return config


def changed_alone(model_type: str, section: str, key: str) -> dict[str, Any]:
    """As `changed`, so that the key is not overruled by others, and means something."""
    config = changed(model_type, section, key)
    target = config[section] if section else config
    language = config.get("text_config", config)
    if key == "torch_dtype" or (key == "dtype" and not section and language is not config):
        del language["dtype"]
    elif model_type == "qwen3" and key in WINDOW:
        target |= {"use_sliding_window": True, "max_window_layers": 2}
        if key == "layer_types":
            target[key] = [*["sliding_attention"] * 2, *[FULL] * 3]
        elif key == "max_window_layers":
            target["sliding_window"] = 5
    elif model_type == "qwen3_moe" and key in WINDOW:
        target["use_sliding_window"] = True
    elif key == "num_local_experts":
        del target["num_experts"]
    elif section == "vision_config" and key == "num_attention_heads":
        target[key] = 6
        del target["num_heads"]
    elif section == "vision_config" and key == "num_hidden_layers":
        target[key] = 3
        del target["depth"]
    elif key == "partial_rotary_factor":
        del target["rope_parameters"]["partial_rotary_factor"]
    elif key in ("rope_scaling", "rope_parameters", "rope_theta"):
        target.pop("rope_parameters", None)
        target[key] = copy.deepcopy(OTHERS[key])
        if section == "vision_config":
            target[key] = {"rope_theta": 123.0} if key != "rope_theta" else 123.0
    elif key == "router_aux_loss_coef":
        target["output_router_logits"] = True
    elif key == "intermediate_size" and model_type in ("qwen3_vl_moe", "qwen3_moe"):
        target["mlp_only_layers"] = [1]
    return config


def outcome(config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Settings of the provider, and the tensors on both sides of the plan."""
    settings, view = settings_of(config), HFConfig.from_dict(config)
    plan = bridge_for(view.architecture).plan_from_config(view, view.dtype, DEFAULTS)
    return settings, (plan.hf, plan.megatron)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the provider; a plan takes three times as long."""
    view = HFConfig.from_dict(config)
    bridge = bridge_for(view.architecture)
    bridge.check(view)
    return bridge.provider_settings(view, view.dtype)


def changed_together(model_type: str, keys: list[Key]) -> list[tuple[list[Key], dict[str, Any]]]:
    """A few configs in which all keys have another value, and none of them hides another.

    Without any one of its changes, a config has another outcome; what changes no outcome is alone.
    """
    groups: list[list[Key]] = [[] for _ in range(5)]
    for number, key in enumerate(keys):
        # Keys that stand side by side in the table are those that are read together.
        at = number % len(groups)
        for group in [*groups[at:], *groups[:at]]:
            if _fits(model_type, group, key):
                group.append(key)
                break
        else:
            groups.append([key])
    for group in groups[:]:
        for key in _hidden(model_type, group):
            group.remove(key)
            groups.append([key])
    return [(group, _with_changes(model_type, group)) for group in groups if group]


def _fits(model_type: str, group: list[Key], key: Key) -> bool:
    """Whether a key is changed beside others, and not instead of them."""
    touched = {name for other in group for name in _changes(model_type, other)}
    if touched & _changes(model_type, key).keys():
        return False
    try:
        settings_of(_with_changes(model_type, [*group, key]))
    except ConfigError:
        return False
    return True


def _hidden(model_type: str, group: list[Key]) -> list[Key]:
    whole = _with_changes(model_type, group)
    settings, hidden = settings_of(whole), []
    for key in group:
        config = _with_changes(model_type, [other for other in group if other != key])
        if settings_of(config) == settings and outcome(config) == outcome(whole):
            hidden.append(key)
    return hidden


@cache
def _changes(model_type: str, key: Key) -> dict[Key, Any]:
    """What `changed_alone` makes another entry of the small config; None if it leaves it out."""
    before, after = _entries(small(model_type)), _entries(changed_alone(model_type, *key))
    names = before | after
    return {name: after.get(name) for name in names if before.get(name) != after.get(name)}


def _entries(config: dict[str, Any]) -> dict[Key, Any]:
    names = ("text_config", "vision_config")
    sections = {name: config[name] for name in names if name in config}
    top = {key: value for key, value in config.items() if key not in sections}
    return {
        (section, key): value
        for section, entries in {"": top, **sections}.items()
        for key, value in entries.items()
    }


def _with_changes(model_type: str, keys: list[Key]) -> dict[str, Any]:
    config = small(model_type)
    for key in keys:
        for (section, name), value in _changes(model_type, key).items():
            target = config[section] if section else config
            if value is None:
                del target[name]
            else:
                target[name] = copy.deepcopy(value)
    return config
