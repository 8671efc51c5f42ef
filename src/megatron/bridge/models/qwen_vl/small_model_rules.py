"""Whether the values of a small model's config make one: what is only found out later otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

POSITIVE = (
    "text_config.decoder_sparse_step",
    "text_config.full_attention_interval",
    "text_config.head_dim",
    "text_config.hidden_size",
    "text_config.intermediate_size",
    "text_config.linear_conv_kernel_dim",
    "text_config.linear_key_head_dim",
    "text_config.linear_num_key_heads",
    "text_config.linear_num_value_heads",
    "text_config.linear_value_head_dim",
    "text_config.moe_intermediate_size",
    "text_config.num_attention_heads",
    "text_config.num_experts",
    "text_config.num_experts_per_tok",
    "text_config.num_hidden_layers",
    "text_config.num_key_value_heads",
    "text_config.shared_expert_intermediate_size",
    "vision_config.depth",
    "vision_config.hidden_size",
    "vision_config.in_channels",
    "vision_config.intermediate_size",
    "vision_config.num_heads",
    "vision_config.num_position_embeddings",
    "vision_config.patch_size",
    "vision_config.spatial_merge_size",
    "vision_config.temporal_patch_size",
)
"""Keys of numbers that must be positive; most of the checks divide by some of them."""


def problems_of(values: Mapping[str, Any]) -> Iterator[str]:
    """Every contradiction in `values`, by dotted key."""
    yield from _text_problems(values)
    yield from _rope_problems(values)
    yield from _hybrid_problems(values)
    yield from _moe_problems(values)
    yield from _vision_problems(values)


def _text_problems(values: Mapping[str, Any]) -> Iterator[str]:
    heads = values["text_config.num_attention_heads"]
    groups = values["text_config.num_key_value_heads"]
    if heads % groups:
        yield (
            f"text_config.num_attention_heads ({heads}) must be a multiple of "
            f"text_config.num_key_value_heads ({groups})"
        )


def _rope_problems(values: Mapping[str, Any]) -> Iterator[str]:
    head_dim = values["text_config.head_dim"]
    key = "text_config.rope_parameters.mrope_section"
    factor_key = "text_config.rope_parameters.partial_rotary_factor"
    section = values[key]
    rotated, what = head_dim, f"text_config.head_dim ({head_dim})"
    if factor_key in values:
        rotated = head_dim * values[factor_key]
        what += f" * {factor_key} ({values[factor_key]})"
    if not 0 < rotated <= head_dim or rotated % 2:
        yield f"{what} must be an even number of rotated dimensions"
    if len(section) != 3 or min(section) < 0 or sum(section) != rotated / 2:
        yield f"{key} {section} must be three counts whose sum is half of {what}"
        return
    # Interleaved, axis a takes the frequencies a, a + 3, a + 6, ...: its last one must exist.
    for axis in (1, 2):
        if section[axis] and axis + 3 * (section[axis] - 1) >= rotated // 2:
            yield (
                f"{key} {section} cannot be interleaved: axis {axis} needs more frequencies than "
                f"every third of {rotated // 2}"
            )


def _hybrid_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Of linear attention and multi-token prediction, in the families that have them."""
    if "text_config.layer_types" not in values:
        return
    key_heads = values["text_config.linear_num_key_heads"]
    value_heads = values["text_config.linear_num_value_heads"]
    if value_heads % key_heads:
        yield (
            f"text_config.linear_num_value_heads ({value_heads}) must be a multiple of "
            f"text_config.linear_num_key_heads ({key_heads})"
        )
    types, layers = values["text_config.layer_types"], values["text_config.num_hidden_layers"]
    known = {"linear_attention", "full_attention"}
    if len(types) != layers or set(types) - known:
        yield (
            f"text_config.layer_types {types} must name one of {', '.join(sorted(known))} for each "
            f"of text_config.num_hidden_layers ({layers})"
        )
    predicted = values["text_config.mtp_num_hidden_layers"]
    if predicted < 0:
        yield f"text_config.mtp_num_hidden_layers must not be negative, found {predicted}"


def _moe_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if "text_config.num_experts" not in values:
        return
    experts, chosen = values["text_config.num_experts"], values["text_config.num_experts_per_tok"]
    if chosen > experts:
        yield (
            f"text_config.num_experts_per_tok ({chosen}) must not exceed text_config.num_experts "
            f"({experts})"
        )
    dense, layers = values["text_config.mlp_only_layers"], values["text_config.num_hidden_layers"]
    if dense != sorted(set(dense)) or any(not 0 <= layer < layers for layer in dense):
        yield (
            f"text_config.mlp_only_layers {dense} must be ascending layer numbers below "
            f"text_config.num_hidden_layers ({layers})"
        )


def _vision_problems(values: Mapping[str, Any]) -> Iterator[str]:
    hidden, heads = values["vision_config.hidden_size"], values["vision_config.num_heads"]
    if hidden % (4 * heads):
        yield (
            f"vision_config.hidden_size ({hidden}) must be a multiple of 4 * "
            f"vision_config.num_heads ({heads}): each head has two rotary axes of sine and cosine"
        )
    positions = values["vision_config.num_position_embeddings"]
    if math.isqrt(positions) ** 2 != positions:
        yield f"vision_config.num_position_embeddings ({positions}) must be a square number"
    taps, depth = values["vision_config.deepstack_visual_indexes"], values["vision_config.depth"]
    layers = values["text_config.num_hidden_layers"]
    if taps != sorted(set(taps)) or any(not 0 <= tap < depth for tap in taps):
        yield (
            f"vision_config.deepstack_visual_indexes {taps} must be ascending block numbers below "
            f"vision_config.depth ({depth})"
        )
    if len(taps) > layers:
        yield (
            f"vision_config.deepstack_visual_indexes {taps} needs as many text layers; "
            f"text_config.num_hidden_layers is {layers}"
        )
    out, text_hidden = values["vision_config.out_hidden_size"], values["text_config.hidden_size"]
    if out != text_hidden:
        yield (
            f"vision_config.out_hidden_size ({out}) must be text_config.hidden_size ({text_hidden})"
        )
