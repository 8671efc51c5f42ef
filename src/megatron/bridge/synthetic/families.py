"""What the released models of each family look like, at a size for tests.

All sizes differ from one another and no matrix is square, so that a transposed or swapped tensor
cannot go unnoticed. The vocabulary is not a multiple of anything, the number of layers is odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    `config` is its config.json in the released form; the ids of tokens are filled in, in
    `token_ids` by dotted key, from the order of `tokens`: those follow the ordinary vocabulary.
    The first `special_tokens` of them are special, which means left out when text is decoded.
    """

    name: str
    config: Mapping[str, Any]
    tokens: tuple[str, ...]
    special_tokens: int
    token_ids: Mapping[str, str]
    processor_class: str
    image_processor_type: str
    video_processor_type: str


_QWEN_TOKENS = (
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

_QWEN3_VL = Family(
    name="qwen3-vl",
    config={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 160,
            "initializer_range": 0.02,
            "intermediate_size": 352,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 8,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
                "rope_type": "default",
            },
            "rope_theta": 5000000.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": 307,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": [0, 2],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 112,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 208,
            # As released; transformers knows that "qwen3_vl_vision" is meant.
            "model_type": "qwen3_vl",
            "num_heads": 4,
            "num_position_embeddings": 81,
            "out_hidden_size": 160,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    tokens=_QWEN_TOKENS,
    special_tokens=_QWEN_TOKENS.index("<|video_pad|>") + 1,
    token_ids={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "text_config.bos_token_id": "<|endoftext|>",
        "text_config.eos_token_id": "<|im_end|>",
    },
    processor_class="Qwen3VLProcessor",
    image_processor_type="Qwen2VLImageProcessorFast",
    video_processor_type="Qwen3VLVideoProcessor",
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (_QWEN3_VL,)}
"""Family name -> declaration."""


def find_family(name: str) -> Family:
    """The family called `name`; UnsupportedModel, listing what there is, if there is none."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise UnsupportedModel(
            f"no synthetic model of family {name!r}; there is {', '.join(FAMILIES)}"
        ) from None
