"""Configs of small models, drawn key by key: stated or left out, in either form, in any mixture."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from oracle import tiny

LINEAR, FULL = "linear_attention", "full_attention"
ABSENT = object()

type Draw = Any


def drawn_config(draw: Draw, model_type: str) -> dict[str, Any]:
    """A config.json of this model type that transformers takes and a small machine runs."""
    hybrid, moe = "3_5" in model_type, model_type.endswith("moe")
    vision = _vision(draw, deepstack=not hybrid)
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [f"{tiny.FAMILIES[model_type][0]}ForConditionalGeneration"],
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "text_config": _text(draw, hybrid=hybrid),
        "vision_config": vision,
    }
    text = config["text_config"]
    text["hidden_size"] = vision["out_hidden_size"]
    if moe:
        _experts(draw, text, hybrid=hybrid)
    else:
        text["intermediate_size"] = draw(st.sampled_from([144, 72]))
    _state(draw, config, "tie_word_embeddings", [True, False])
    _state(draw, config, "use_cache", [True, False])
    if draw(st.booleans()):
        del config["architectures"]
    return config


def _state(draw: Draw, target: dict[str, Any], key: str, values: list[Any]) -> None:
    """Set a key to one of the values, or leave it out."""
    value = draw(st.sampled_from([ABSENT, *values]))
    if value is not ABSENT:
        target[key] = value


def _text(draw: Draw, *, hybrid: bool) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2]))
    text: dict[str, Any] = {
        "dtype": "float32",
        "vocab_size": draw(st.sampled_from([307, 320])),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.sampled_from([1, 3])),
        "num_hidden_layers": draw(st.sampled_from([3, 5])),
    }
    if hybrid:
        text |= {
            "head_dim": draw(st.sampled_from([64, 32])),
            "linear_num_key_heads": 2,
            "linear_num_value_heads": draw(st.sampled_from([2, 4, 6])),
            "linear_key_head_dim": draw(st.sampled_from([120, 56])),
            "linear_value_head_dim": draw(st.sampled_from([104, 44])),
        }
        _state(draw, text, "linear_conv_kernel_dim", [4, 3])
        _layer_types(draw, text)
        _state(draw, text, "attn_output_gate", [True, False])
        _state(draw, text, "mtp_num_hidden_layers", [0])
        _state(draw, text, "mamba_ssm_dtype", ["float32"])
    else:
        text["head_dim"] = draw(st.sampled_from([16, 24]))
    text |= {"max_position_embeddings": draw(st.sampled_from([4096, 262144]))}
    _state(draw, text, "rms_norm_eps", [1e-6, 1e-3])
    _state(draw, text, "attention_bias", [True, False])
    _state(draw, text, "attention_dropout", [0.0, 0.3])
    _state(draw, text, "hidden_act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
    _state(draw, text, "initializer_range", [0.02, 0.5])
    _state(draw, text, "tie_word_embeddings", [True, False])
    _state(draw, text, "pad_token_id", [5])
    _rope(draw, text, hybrid=hybrid)
    return text


def _layer_types(draw: Draw, text: dict[str, Any]) -> None:
    count = text["num_hidden_layers"]
    how = draw(st.sampled_from(["stated", "interval", "absent"]))
    if how == "stated":
        kinds = st.lists(st.sampled_from([LINEAR, FULL]), min_size=count, max_size=count)
        text["layer_types"] = draw(kinds)
    elif how == "interval":
        text["full_attention_interval"] = draw(st.sampled_from([1, 2, 3]))


def _rope(draw: Draw, text: dict[str, Any], *, hybrid: bool) -> None:
    rope: dict[str, Any] = {}
    _state(draw, rope, "rope_theta", [100.0, 5_000_000])
    _state(draw, rope, "mrope_section", [[4, 2, 2], [3, 3, 2], [1, 4, 2], [24, 20, 20]])
    _state(draw, rope, "mrope_interleaved", [True, False])
    if hybrid:
        _state(draw, rope, "partial_rotary_factor", [0.25, 0.5, 1.0])
    kind = draw(st.sampled_from(["default", ABSENT, "yarn", "linear"]))
    if kind in ("yarn", "linear"):
        rope["factor"] = draw(st.sampled_from([4.0, 2.0]))
        rope["rope_type"] = kind
        if kind == "yarn":
            _state(draw, rope, "original_max_position_embeddings", [64, 2048])
            _state(draw, rope, "attention_factor", [1.25])
            _state(draw, rope, "beta_fast", [16.0])
    elif kind is not ABSENT:
        rope["rope_type"] = kind
    form = draw(st.sampled_from(["rope_parameters", "rope_scaling"]))
    if form == "rope_scaling":
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                text[key] = rope.pop(key)
        if "rope_type" in rope and draw(st.booleans()):
            rope["type"] = rope.pop("rope_type")
    if rope:
        text[form] = rope


def _experts(draw: Draw, text: dict[str, Any], *, hybrid: bool) -> None:
    text["moe_intermediate_size"] = draw(st.sampled_from([28, 36]))
    count = draw(st.sampled_from([4, 7]))
    text["num_experts"] = count
    text["num_experts_per_tok"] = draw(st.sampled_from([1, 3]))
    _state(draw, text, "output_router_logits", [True, False])
    _state(draw, text, "router_aux_loss_coef", [0.5])
    _state(draw, text, "norm_topk_prob", [True, False])
    if hybrid:
        text["shared_expert_intermediate_size"] = draw(st.sampled_from([38, 52]))
        _state(draw, text, "mlp_only_layers", [[0], []])
        return
    text["intermediate_size"] = draw(st.sampled_from([144, 72]))
    _state(draw, text, "mlp_only_layers", [[], [1], [0, 2]])
    _state(draw, text, "decoder_sparse_step", [1, 2])
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers", [])
    layers = range(text["num_hidden_layers"])
    if not any(layer not in dense and (layer + 1) % step == 0 for layer in layers):
        text.pop("output_router_logits", None)  # transformers' loss fails without a router
    if draw(st.booleans()):
        text["num_local_experts"] = text.pop("num_experts")


def _vision(draw: Draw, *, deepstack: bool) -> dict[str, Any]:
    heads = draw(st.sampled_from([2, 3]))
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": heads * draw(st.sampled_from([16, 12])),
        "intermediate_size": draw(st.sampled_from([112, 70])),
        "out_hidden_size": draw(st.sampled_from([80, 96])),
        "num_position_embeddings": draw(st.sampled_from([49, 36])),
    }
    vision[draw(st.sampled_from(["num_heads", "num_attention_heads"]))] = heads
    if draw(st.booleans()):
        vision["num_hidden_layers"] = vision.pop("depth")
    _state(draw, vision, "patch_size", [8])
    _state(draw, vision, "temporal_patch_size", [1, 2])
    _state(draw, vision, "in_channels", [1, 3])
    _state(draw, vision, "spatial_merge_size", [1, 2])
    _state(draw, vision, "hidden_act", ["gelu_pytorch_tanh", "gelu", "silu"])
    _state(draw, vision, "initializer_range", [0.3])
    rope: dict[str, Any] = {}
    _state(draw, rope, "rope_theta", [100.0, 10000.0])
    _state(draw, rope, "rope_type", ["axial", "default"])
    if rope:
        vision["rope_parameters"] = rope
    if deepstack:
        vision["deepstack_visual_indexes"] = draw(st.sampled_from([[0, 2], [1], []]))
    else:
        _state(draw, vision, "deepstack_visual_indexes", [[]])
    return vision
