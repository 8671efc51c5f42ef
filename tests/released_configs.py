"""Configs of released models, written from their published sizes, and what their files hold."""

from typing import Any

VISION_12 = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
VISION_24 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
VISION_27 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}

# Everything that config.json says for a size of a model: architecture, text and vision differ.
_TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
}
_QWEN3_VL_TEXT = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
        "rope_type": "default",
    },
    "rope_theta": 5000000,
    "vocab_size": 151936,
}
_QWEN3_5_TEXT: dict[str, Any] = {
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "vocab_size": 248320,
}


def _config(
    architecture: str,
    model_type: str,
    first_vision_token: int,
    deepstack: list[int],
    vision: dict[str, int],
    tied: bool,
    text: dict[str, Any],
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_token_id": first_vision_token + 3,
        "video_token_id": first_vision_token + 4,
        "vision_start_token_id": first_vision_token,
        "vision_end_token_id": first_vision_token + 1,
        "tie_word_embeddings": tied,
        "text_config": {"model_type": f"{model_type}_text", **_TEXT, **text},
        "vision_config": {
            "model_type": model_type,
            "deepstack_visual_indexes": deepstack,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }


def _text(hidden: int, layers: int, heads: int, kv: int, **others: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **others,
    }


def _experts(inter: int, experts: int, chosen: int) -> dict[str, Any]:
    return {
        "mlp_only_layers": [],
        "moe_intermediate_size": inter,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "router_aux_loss_coef": 0.001,
    }


def _qwen3_vl(
    architecture: str, model_type: str, vision: dict[str, int], tied: bool, text: dict[str, Any]
) -> dict[str, Any]:
    deepstack = [5, 11, 17] if vision["depth"] == 24 else [8, 16, 24]
    return _config(architecture, model_type, 151652, deepstack, vision, tied, _QWEN3_VL_TEXT | text)


def qwen3_vl(
    hidden: int, layers: int, heads: int, kv: int, inter: int, vision: dict[str, int], tied: bool
) -> dict[str, Any]:
    """config.json of a released dense Qwen3-VL (old form of rope)."""
    text = _text(hidden, layers, heads, kv, intermediate_size=inter)
    return _qwen3_vl("Qwen3VLForConditionalGeneration", "qwen3_vl", vision, tied, text)


def qwen3_vl_moe(
    hidden: int, layers: int, heads: int, kv: int, inter: int, moe_inter: int
) -> dict[str, Any]:
    """config.json of a released Qwen3-VL MoE; `inter` belongs to dense layers it has none of."""
    text = _text(hidden, layers, heads, kv, intermediate_size=inter, decoder_sparse_step=1)
    text |= {**_experts(moe_inter, 128, 8), "norm_topk_prob": True}
    return _qwen3_vl("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", VISION_27, False, text)


def _qwen3_5(
    architecture: str, model_type: str, vision: dict[str, int], tied: bool, text: dict[str, Any]
) -> dict[str, Any]:
    interval = _QWEN3_5_TEXT["full_attention_interval"]
    text = text | {
        "layer_types": [
            "linear_attention" if (number + 1) % interval else "full_attention"
            for number in range(text["num_hidden_layers"])
        ]
    }
    return _config(architecture, model_type, 248053, [], vision, tied, _QWEN3_5_TEXT | text)


def qwen3_5(
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    inter: int,
    value_heads: int,
    vision: dict[str, int],
    tied: bool,
) -> dict[str, Any]:
    """config.json of a released dense Qwen3.5 (new form of rope)."""
    text = _text(hidden, layers, heads, kv, intermediate_size=inter)
    text["linear_num_value_heads"] = value_heads
    return _qwen3_5("Qwen3_5ForConditionalGeneration", "qwen3_5", vision, tied, text)


def qwen3_5_moe(
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    inter: int,
    experts: int,
    chosen: int,
    value_heads: int,
) -> dict[str, Any]:
    """config.json of a released Qwen3.5 MoE; `inter` is also the shared expert's."""
    text = _text(hidden, layers, heads, kv, shared_expert_intermediate_size=inter)
    text |= {**_experts(inter, experts, chosen), "linear_num_value_heads": value_heads}
    return _qwen3_5("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", VISION_27, False, text)


QWEN3_VL_2B = qwen3_vl(2048, 28, 16, 8, 6144, VISION_24, tied=True)
QWEN3_VL_4B = qwen3_vl(2560, 36, 32, 8, 9728, VISION_24, tied=True)
QWEN3_VL_8B = qwen3_vl(4096, 36, 32, 8, 12288, VISION_27, tied=False)
QWEN3_VL_32B = qwen3_vl(5120, 64, 64, 8, 25600, VISION_27, tied=False)
QWEN3_VL_30B_A3B = qwen3_vl_moe(2048, 48, 32, 4, 6144, 768)
QWEN3_VL_235B_A22B = qwen3_vl_moe(4096, 94, 64, 4, 12288, 1536)
QWEN3_5_0_8B = qwen3_5(1024, 24, 8, 2, 3584, 16, VISION_12, tied=True)
QWEN3_5_2B = qwen3_5(2048, 24, 8, 2, 6144, 16, VISION_24, tied=True)
QWEN3_5_4B = qwen3_5(2560, 32, 16, 4, 9216, 32, VISION_24, tied=True)
QWEN3_5_9B = qwen3_5(4096, 32, 16, 4, 12288, 32, VISION_27, tied=False)
QWEN3_5_27B = qwen3_5(5120, 64, 24, 4, 17408, 48, VISION_27, tied=False)
QWEN3_5_35B_A3B = qwen3_5_moe(2048, 40, 16, 2, 512, 256, 8, 32)
QWEN3_5_122B_A10B = qwen3_5_moe(3072, 48, 32, 2, 1024, 256, 8, 64)
QWEN3_5_397B_A17B = qwen3_5_moe(4096, 60, 32, 2, 1024, 512, 10, 64)

# Name of a config, tensors on disk, bytes of tensor data where they are known.
RELEASED: list[tuple[str, int, int | None]] = [
    ("QWEN3_VL_2B", 625, 4_255_064_064),
    ("QWEN3_VL_4B", 713, 8_875_631_616),
    ("QWEN3_VL_8B", 750, None),
    ("QWEN3_VL_32B", 1058, None),
    ("QWEN3_VL_30B_A3B", 882, 62_141_508_064),
    ("QWEN3_VL_235B_A22B", 1388, 471_340_045_792),
    ("QWEN3_5_0_8B", 488, None),
    ("QWEN3_5_2B", 632, 4_548_144_832),
    ("QWEN3_5_4B", 738, None),
    ("QWEN3_5_9B", 775, 19_306_216_416),
    ("QWEN3_5_27B", 1199, None),
    ("QWEN3_5_35B_A3B", 1811, None),
    ("QWEN3_5_122B_A10B", 1949, 250_173_007_840),
    ("QWEN3_5_397B_A17B", 2924, 806_795_875_168),
]

QWEN3_8_2400B_A95B = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "tie_word_embeddings": False,
    **_TEXT,
    **_QWEN3_5_TEXT,
    **_text(8192, 92, 64, 4, shared_expert_intermediate_size=2048),
    **_experts(2048, 512, 10),
    "linear_num_value_heads": 128,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 23,
}
"""The largest open model, of text alone: 2,446,182,725,504 parameters with its MTP layer."""
