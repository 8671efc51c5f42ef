"""What the released models of each family look like, at a size for tests.

All sizes differ from one another and no matrix is square, so that a transposed or swapped tensor
cannot go unnoticed. The vocabulary is not a multiple of anything, the number of layers not one of
four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from megatron.bridge.models.qwen_vl.small_model_rules import POSITIVE, problems_of
from megatron.bridge.models.small_model import (
    Parameters,
    SmallModel,
    Values,
    register_small_models,
)

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
_LAYER = "model.language_model.layers.0."
# Left as they are: head, embeddings, norms, the router, the gate of the shared expert, the small
# projections, convolution and vectors of the Gated DeltaNet, the vision model, mtp.fc.
_FP8_MATRICES = (
    r"^(model\.language_model|mtp)\.layers\..*"
    r"\.([qkvo]_proj|in_proj_qkv|in_proj_z|out_proj|gate_proj|up_proj|down_proj)\.weight$"
)
# A conversation in the ChatML format, each image or video as its placeholder between marks; the
# processor replaces the placeholder by one token per merged patch.
_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('cannot render content of type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
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


def _complete(given: Values, values: MutableMapping[str, Any]) -> None:
    """The types of layers follow their number and the interval."""
    if "text_config.layer_types" in values.keys() - given.keys():
        # An interval of zero is refused later, by its own name.
        interval = max(1, values["text_config.full_attention_interval"])
        values["text_config.layer_types"] = [
            "linear_attention" if number % interval else "full_attention"
            for number in range(1, values["text_config.num_hidden_layers"] + 1)
        ]


def _mtp_parameters(config: Values, parameters: Callable[[Values], Parameters]) -> Iterator[Any]:
    """transformers has no such module. Its layers are ordinary ones with full attention."""
    text = config["text_config"]
    layers = text["mtp_num_hidden_layers"]
    if not layers:
        return
    hidden = text["hidden_size"]
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield f"mtp.{norm}.weight", (hidden,)
    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    model = {**config, "text_config": {**text, **one_layer}}
    model["vision_config"] = {**config["vision_config"], "depth": 1}
    for name, shape in parameters(model):
        if name.startswith(_LAYER):
            for number in range(layers):
                yield f"mtp.layers.{number}.{name.removeprefix(_LAYER)}", shape


def _family(name: str, config: dict[str, Any], fixed: tuple[str, ...], **fields: Any) -> SmallModel:
    """A family, with what all of them have in common."""
    return SmallModel(
        name=name,
        config=config,
        tokens=_TOKENS,
        special_tokens=_TOKENS.index("<|video_pad|>") + 1,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        pad_token="<|endoftext|>",
        generation={"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        chat_template=_CHAT_TEMPLATE,
        auto_model="AutoModelForImageTextToText",
        language="text_config.",
        shorts={"text.": "text_config.", "vision.": "vision_config."},
        aliases={"text_config.num_local_experts": "text_config.num_experts"},
        follow={
            "text_config.tie_word_embeddings": "tie_word_embeddings",
            "vision_config.out_hidden_size": "text_config.hidden_size",
        },
        complete=_complete,
        fixed=("text_config.model_type", "vision_config.model_type", *fixed),
        positive=POSITIVE,
        problems=problems_of,
        fp8_matrices=_FP8_MATRICES,
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
        {"intermediate_size": 352, "num_hidden_layers": 5, "tie_word_embeddings": False},
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
    "further_parameters": _mtp_parameters,
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
    expert_options={"mtp.": "mtp_experts"},
    fp8_options={"experts": "per-expert"},
    **_HYBRID,
)

register_small_models(_QWEN3_VL, _QWEN3_VL_MOE, _QWEN3_5, _QWEN3_5_MOE)
