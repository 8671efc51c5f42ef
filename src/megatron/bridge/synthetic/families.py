"""What the released models of each family look like, at a size for tests.

All sizes differ from one another and no matrix is square, so that a transposed or swapped tensor
cannot go unnoticed. The vocabulary is not a multiple of anything, the number of layers not one of
four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.bridge.errors import UnsupportedModel
from megatron.bridge.synthetic.family import Family

_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_VISION_TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

_TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 160,
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": 307,
}
_MOE = {
    "moe_intermediate_size": 48,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
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
_HYBRID_ATTENTION = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 64,
    # Follows the number of layers and the interval, unless it is set.
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_conv_kernel_dim": 4,
    # Nearly as large as the released 128: much smaller heads amplify rounding.
    "linear_key_head_dim": 118,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 102,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 6,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
        "rope_type": "default",
    },
}


def _config(
    architecture: str, model_type: str, deepstack: list[int], *text: Mapping[str, Any]
) -> dict[str, Any]:
    text_config: dict[str, Any] = {"model_type": f"{model_type}_text"}
    for part in (_TEXT, *text):
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


def _family(name: str, config: dict[str, Any], **fields: Any) -> Family:
    """A family, with what all of them have in common."""
    return Family(
        name=name,
        config=config,
        tokens=_TOKENS,
        special_tokens=_TOKENS.index("<|video_pad|>") + 1,
        processor_class="Qwen3VLProcessor",
        image_processor_type="Qwen2VLImageProcessorFast",
        video_processor_type="Qwen3VLVideoProcessor",
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
        {"intermediate_size": 352, "num_hidden_layers": 5, "tie_word_embeddings": False},
    ),
    **_VL,
)
_QWEN3_VL_MOE = _family(
    "qwen3-vl-moe",
    _config(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        [0, 2],
        _VL_ATTENTION,
        _MOE,
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
    "text_config.attn_output_gate",
    "text_config.mtp_use_dedicated_embeddings",
    "vision_config.deepstack_visual_indexes",
)
_HYBRID = {
    "tokenizer_class": "Qwen3_5Tokenizer",
    "token_ids": _VISION_TOKEN_IDS | {"text_config.eos_token_id": "<|endoftext|>"},
    # All RMSNorms of the text but the one inside the Gated DeltaNet.
    "zero_centred_norms": r"^(mtp|model\.language_model)\.(?!.*\.linear_attn\.).*norm\w*\.weight$",
    "ssm_tensors": r"\.linear_attn\.(A_log|norm\.weight)$",
}
_HYBRID_OPTIONS = {"rope_form": "new", "ssm_dtype": "float32"}
_QWEN3_5 = _family(
    "qwen3.5",
    _config(
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        [],
        _HYBRID_ATTENTION,
        {"intermediate_size": 352, "num_hidden_layers": 6},
    ),
    fixed=_HYBRID_FIXED,
    options=_HYBRID_OPTIONS,
    **_HYBRID,
)
_QWEN3_5_MOE = _family(
    "qwen3.5-moe",
    _config(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        [],
        _HYBRID_ATTENTION,
        _MOE,
        {"mlp_only_layers": [], "num_hidden_layers": 7, "shared_expert_intermediate_size": 72},
    ),
    fixed=(*_HYBRID_FIXED, "text_config.mlp_only_layers"),
    options=_HYBRID_OPTIONS | {"experts": "fused", "mtp_experts": "per-expert"},
    fp8_options={"experts": "per-expert"},
    **_HYBRID,
)

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (_QWEN3_VL, _QWEN3_VL_MOE, _QWEN3_5, _QWEN3_5_MOE)
}
"""Family name -> declaration."""


def find_family(name: str) -> Family:
    """The family called `name`; UnsupportedModel, listing what there is, if there is none."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise UnsupportedModel(
            f"no synthetic model of family {name!r}; there is {', '.join(FAMILIES)}"
        ) from None
