"""Whether the values of a small model's config make one: what is only found out later otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_LANGUAGE_POSITIVE = (
    "decoder_sparse_step",
    "full_attention_interval",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "shared_expert_intermediate_size",
)
_VISION_POSITIVE = (
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


def positive(language: str, *, vision: bool = False) -> tuple[str, ...]:
    """Keys of numbers that must be positive; most of the checks divide by some of them.

    language: what the keys of the language model begin with.
    """
    keys = tuple(f"{language}{key}" for key in _LANGUAGE_POSITIVE)
    return (*keys, *_VISION_POSITIVE) if vision else keys


def language_problems(values: Mapping[str, Any], language: str) -> Iterator[str]:
    """Every contradiction in `values` of a language model, by dotted key."""
    yield from _attention_problems(values, language)
    yield from _rope_problems(values, language)
    yield from _hybrid_problems(values, language)
    yield from _moe_problems(values, language)


def _attention_problems(values: Mapping[str, Any], language: str) -> Iterator[str]:
    heads = values[f"{language}num_attention_heads"]
    groups = values[f"{language}num_key_value_heads"]
    if heads % groups:
        yield (
            f"{language}num_attention_heads ({heads}) must be a multiple of "
            f"{language}num_key_value_heads ({groups})"
        )


def _rope_problems(values: Mapping[str, Any], language: str) -> Iterator[str]:
    head_dim = values[f"{language}head_dim"]
    key = f"{language}rope_parameters.mrope_section"
    factor_key = f"{language}rope_parameters.partial_rotary_factor"
    rotated, what = head_dim, f"{language}head_dim ({head_dim})"
    if factor_key in values:
        rotated = head_dim * values[factor_key]
        what += f" * {factor_key} ({values[factor_key]})"
    if not 0 < rotated <= head_dim or rotated % 2:
        yield f"{what} must be an even number of rotated dimensions"
    if key not in values:  # a token has one position
        return
    section = values[key]
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


def _hybrid_problems(values: Mapping[str, Any], language: str) -> Iterator[str]:
    """Of linear attention and multi-token prediction, in the families that have them."""
    if f"{language}layer_types" not in values:
        return
    key_heads = values[f"{language}linear_num_key_heads"]
    value_heads = values[f"{language}linear_num_value_heads"]
    if value_heads % key_heads:
        yield (
            f"{language}linear_num_value_heads ({value_heads}) must be a multiple of "
            f"{language}linear_num_key_heads ({key_heads})"
        )
    types, layers = values[f"{language}layer_types"], values[f"{language}num_hidden_layers"]
    known = {"linear_attention", "full_attention"}
    if len(types) != layers or set(types) - known:
        yield (
            f"{language}layer_types {types} must name one of {', '.join(sorted(known))} for each "
            f"of {language}num_hidden_layers ({layers})"
        )
    predicted = values[f"{language}mtp_num_hidden_layers"]
    if predicted < 0:
        yield f"{language}mtp_num_hidden_layers must not be negative, found {predicted}"


def _moe_problems(values: Mapping[str, Any], language: str) -> Iterator[str]:
    if f"{language}num_experts" not in values:
        return
    experts, chosen = values[f"{language}num_experts"], values[f"{language}num_experts_per_tok"]
    if chosen > experts:
        yield (
            f"{language}num_experts_per_tok ({chosen}) must not exceed {language}num_experts "
            f"({experts})"
        )
    dense, layers = values[f"{language}mlp_only_layers"], values[f"{language}num_hidden_layers"]
    if dense != sorted(set(dense)) or any(not 0 <= layer < layers for layer in dense):
        yield (
            f"{language}mlp_only_layers {dense} must be ascending layer numbers below "
            f"{language}num_hidden_layers ({layers})"
        )


def vision_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Every contradiction in `values` of a vision tower beside a language model."""
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
