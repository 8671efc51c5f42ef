"""What the released vision-language models of each family look like, at a size for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.qwen_vl.small_language import (
    DENSE,
    HYBRID_ATTENTION,
    HYBRID_FIXED,
    HYBRID_OPTIONS,
    MOE,
    SHARED_EXPERT,
    TEXT,
    fp8_matrices,
    hybrid,
    small_model,
)
from megatron.bridge.models.small_model import SmallModel, Values, register_small_models

_LANGUAGE = "text_config."
_ROOT = "model.language_model"
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
    for part in (TEXT, *text):
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


def _family(name: str, config: dict[str, Any], fixed: tuple[str, ...], **fields: Any) -> SmallModel:
    """A family, with what all of them have in common."""
    return small_model(
        name,
        config,
        _LANGUAGE,
        auto_model="AutoModelForImageTextToText",
        follow={
            "text_config.tie_word_embeddings": "tie_word_embeddings",
            "vision_config.out_hidden_size": "text_config.hidden_size",
        },
        fixed=("text_config.model_type", "vision_config.model_type", *fixed),
        fp8_matrices=fp8_matrices(_ROOT.replace(".", r"\.")),
        processors=_processors,
        **fields,
    )


_VL = {
    "tokenizer_class": "Qwen2Tokenizer",
    "token_ids": _VISION_TOKEN_IDS
    | {"text_config.bos_token_id": "<|endoftext|>", "text_config.eos_token_id": "<|im_end|>"},
}
_QWEN3_VL = _family(
    "qwen3-vl",
    _config(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        [0, 2],
        _VL_ATTENTION,
        DENSE | {"num_hidden_layers": 5, "tie_word_embeddings": False},
    ),
    fixed=(),
    **_VL,
)
_QWEN3_VL_MOE = _family(
    "qwen3-vl-moe",
    _config(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        [0, 2],
        _VL_ATTENTION,
        MOE,
        {
            "decoder_sparse_step": 1,
            # Of dense layers, which released models do not have.
            "intermediate_size": 352,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_hidden_layers": 7,
        },
    ),
    fixed=("text_config.norm_topk_prob",),
    options={"experts": "fused-transposed"},
    **_VL,
)

_HYBRID_FIXED = (
    *(f"{_LANGUAGE}{key}" for key in HYBRID_FIXED),
    "vision_config.deepstack_visual_indexes",
)
_HYBRID = {
    "token_ids": _VISION_TOKEN_IDS | {"text_config.eos_token_id": "<|endoftext|>"},
    **hybrid(_LANGUAGE, _ROOT),
}
_QWEN3_5 = _family(
    "qwen3.5",
    _config(
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        [],
        HYBRID_ATTENTION,
        DENSE | {"num_hidden_layers": 6},
    ),
    fixed=_HYBRID_FIXED,
    options=HYBRID_OPTIONS,
    **_HYBRID,
)
_QWEN3_5_MOE = _family(
    "qwen3.5-moe",
    _config(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        [],
        HYBRID_ATTENTION,
        MOE,
        SHARED_EXPERT | {"num_hidden_layers": 7},
    ),
    fixed=(*_HYBRID_FIXED, "text_config.mlp_only_layers"),
    options=HYBRID_OPTIONS | {"experts": "fused", "mtp_experts": "per-expert"},
    expert_options={"mtp.": "mtp_experts"},
    fp8_options={"experts": "per-expert"},
    **_HYBRID,
)

register_small_models(_QWEN3_VL, _QWEN3_VL_MOE, _QWEN3_5, _QWEN3_5_MOE)
