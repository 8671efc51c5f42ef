"""Configs of released models, written from their published sizes, and what their files hold."""

from typing import Any

VISION_24 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
VISION_27 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}


def qwen3_vl(
    hidden: int, layers: int, heads: int, kv: int, inter: int, vision: dict[str, int], tied: bool
) -> dict[str, Any]:
    """config.json of a released dense Qwen3-VL (old form of rope)."""
    deepstack = [5, 11, 17] if vision["depth"] == 24 else [8, 16, 24]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": inter,
            "max_position_embeddings": 262144,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": deepstack,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }


QWEN3_VL_2B = qwen3_vl(2048, 28, 16, 8, 6144, VISION_24, tied=True)
QWEN3_VL_4B = qwen3_vl(2560, 36, 32, 8, 9728, VISION_24, tied=True)
QWEN3_VL_8B = qwen3_vl(4096, 36, 32, 8, 12288, VISION_27, tied=False)
QWEN3_VL_32B = qwen3_vl(5120, 64, 64, 8, 25600, VISION_27, tied=False)
