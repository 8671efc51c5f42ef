"""What small models of every family have in common: tokens, sizes, and what follows from them.

All sizes differ from one another and no matrix is square, so that a transposed or swapped tensor
cannot go unnoticed. The vocabulary is not a multiple of anything, the number of layers not one of
four.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron.bridge.models.small_model import Parameters, SmallModel, Values

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
TEXT_CONFIG = {
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
MOE_CONFIG = {
    "moe_intermediate_size": 48,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
HYBRID_ATTENTION_CONFIG = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 64,
    "layer_types": ["full_attention"],  # as transformers completes it, unless it is set
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


# What a family's dense or sparse variant adds.
DENSE_CONFIG = {"intermediate_size": 352}
QWEN3_MOE_CONFIG = {
    **MOE_CONFIG,
    **DENSE_CONFIG,  # of dense layers, which released models do not have
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_hidden_layers": 7,
}
SHARED_EXPERT_CONFIG = {"mlp_only_layers": [], "shared_expert_intermediate_size": 72}


def small_model(
    name: str,
    config: dict[str, Any],
    language: str,
    root: str,
    *,
    hybrid: bool = False,
    fixed: tuple[str, ...] = (),
    fixed_elsewhere: tuple[str, ...] = (),
    token_ids: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> SmallModel:
    """The declaration of a family, with what all of them have in common.

    Args:
        name: name of the family.
        config: its config.json.
        language: what keys of the language model begin with.
        root: what names of its tensors begin with.
        hybrid: whether it has Gated DeltaNet layers.
        fixed: keys of the language model that are no settings.
        fixed_elsewhere: keys of other sections that are no settings.
        token_ids: as in SmallModel, without those that every language model has.
        options: as in SmallModel, without those that follow from `hybrid`.
        **fields: the other fields of SmallModel.
    """
    if hybrid:
        fixed = ("attn_output_gate", "mtp_use_dedicated_embeddings", *fixed)
        options = {"rope_form": "new", "ssm_dtype": "float32", **(options or {})}
        fields |= _hybrid(language, root)
        special = {"eos_token_id": "<|endoftext|>"}
    else:
        fields["tokenizer_class"] = "Qwen2Tokenizer"
        special = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
    return SmallModel(
        name=name,
        config=config,
        tokens=_TOKENS,
        token_ids={**(token_ids or {}), **{f"{language}{k}": v for k, v in special.items()}},
        special_tokens=_TOKENS.index("<|video_pad|>") + 1,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        pad_token="<|endoftext|>",
        generation={"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        chat_template=_CHAT_TEMPLATE,
        language=language,
        fixed=(*(f"{language}{key}" for key in fixed), *fixed_elsewhere),
        options=options or {},
        fp8_matrices=_fp8_matrices(root),
        **fields,
    )


def _fp8_matrices(root: str) -> str:
    """Pattern of the matrices that an FP8 release quantizes, in a language model of these names.

    It leaves as they are: head, embeddings, norms, the router, the gate of the shared expert, the
    small projections, convolution and vectors of the Gated DeltaNet, the vision model, mtp.fc.
    """
    return (
        rf"^({re.escape(root)}|mtp)\.layers\..*"
        r"\.([qkvo]_proj|in_proj_qkv|in_proj_z|out_proj|gate_proj|up_proj|down_proj)\.weight$"
    )


def _hybrid(language: str, root: str) -> dict[str, Any]:
    """What families with Gated DeltaNet layers have besides.

    Args:
        language: what keys of the language model begin with.
        root: what names of its tensors begin with.
    """

    def mtp_parameters(
        config: Values, parameters: Callable[[Values], Parameters]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Parameters that transformers has no module for: ordinary layers with full attention."""
        section = language.rstrip(".")
        text = config[section] if section else config
        layers, hidden = text["mtp_num_hidden_layers"], text["hidden_size"]
        if not layers:
            return
        yield "mtp.fc.weight", (hidden, 2 * hidden)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{norm}.weight", (hidden,)
        one_layer = {**text, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
        model = {**config, section: one_layer} if section else one_layer
        if "vision_config" in config:
            model["vision_config"] = {**config["vision_config"], "depth": 1}
        first = f"{root}.layers.0."
        for name, shape in parameters(model):
            if name.startswith(first):
                for number in range(layers):
                    yield f"mtp.layers.{number}.{name.removeprefix(first)}", shape

    return {
        "tokenizer_class": "Qwen3_5Tokenizer",
        "completed": {f"{language}layer_types": f"{language}full_attention_interval"},
        "further_parameters": mtp_parameters,
        # All RMSNorms of the text but the one inside the Gated DeltaNet.
        "zero_centred_norms": rf"^(mtp|{re.escape(root)})\.(?!.*\.linear_attn\.).*norm\w*\.weight$",
        "ssm_tensors": r"\.linear_attn\.(A_log|norm\.weight)$",
    }
