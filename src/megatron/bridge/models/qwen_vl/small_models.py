"""What the released vision-language models of each family look like, at a size for tests."""

from __future__ import annotations

from collections.abc import Mapping
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
from megatron.bridge.models.small_model import SmallModel, Values, register_small_models

_VISION_TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

_VL_ATTENTION = {
    "head_dim": 32,
    "num_attention_heads": 8,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_theta": 5000000.0,
        "rope_type": "default",
    },
}


def _config(
    architecture: str, model_type: str, deepstack: list[int], *text: Mapping[str, Any]
) -> dict[str, Any]:
    text_config: dict[str, Any] = {"model_type": f"{model_type}_text"}
    for part in (TEXT_CONFIG, *text):
        text_config |= part
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": text_config,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": deepstack,
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 112,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 208,
            # As released; transformers knows that the type with "_vision" behind it is meant.
            "model_type": model_type,
            "num_heads": 4,
            "num_position_embeddings": 81,
            "out_hidden_size": text_config["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _processors(config: Values) -> Mapping[str, Any]:
    vision = config["vision_config"]
    common = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": vision["spatial_merge_size"],
        "patch_size": vision["patch_size"],
        "processor_class": "Qwen3VLProcessor",
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    # The released bounds: pixels of an image, pixels of all frames of a video.
    return {
        "preprocessor_config.json": common
        | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        },
        "video_preprocessor_config.json": common
        | {
            "do_sample_frames": True,
            "fps": 2,
            "max_frames": 768,
            "min_frames": 4,
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }


def _family(
    name: str,
    architecture: str,
    model_type: str,
    deepstack: list[int],
    *text: Mapping[str, Any],
    **fields: Any,
) -> SmallModel:
    """The declaration of a family, with what all of them have in common."""
    return small_model(
        name,
        _config(architecture, model_type, deepstack, *text),
        "text_config.",
        "model.language_model",
        token_ids=_VISION_TOKEN_IDS,
        auto_model="AutoModelForImageTextToText",
        follow={
            "text_config.tie_word_embeddings": "tie_word_embeddings",
            "vision_config.out_hidden_size": "text_config.hidden_size",
        },
        processors=_processors,
        **fields,
    )


_NO_DEEPSTACK = ("vision_config.deepstack_visual_indexes",)

register_small_models(
    _family(
        "qwen3-vl",
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        [0, 2],
        _VL_ATTENTION,
        DENSE_CONFIG,
        {"num_hidden_layers": 5, "tie_word_embeddings": False},
    ),
    _family(
        "qwen3-vl-moe",
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        [0, 2],
        _VL_ATTENTION,
        QWEN3_MOE_CONFIG,
        fixed=("norm_topk_prob",),
        options={"experts": "fused-transposed"},
    ),
    _family(
        "qwen3.5",
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        [],
        HYBRID_ATTENTION_CONFIG,
        DENSE_CONFIG,
        {"num_hidden_layers": 6},
        hybrid=True,
        fixed_elsewhere=_NO_DEEPSTACK,
    ),
    _family(
        "qwen3.5-moe",
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        [],
        HYBRID_ATTENTION_CONFIG,
        MOE_CONFIG,
        SHARED_EXPERT_CONFIG,
        {"num_hidden_layers": 7},
        hybrid=True,
        fixed=("mlp_only_layers",),
        fixed_elsewhere=_NO_DEEPSTACK,
        options={"experts": "fused", "mtp_experts": "per-expert"},
        expert_options={"mtp.": "mtp_experts"},
        fp8_options={"experts": "per-expert"},
    ),
)
