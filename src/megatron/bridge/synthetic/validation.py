"""Whether values make a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.conversion.expert_layout import ExpertLayout
from megatron.bridge.models.small_model import SmallModel

CHOICES: Mapping[str, tuple[str, ...]] = {
    "rope_form": ("old", "new"),
    "dtype": ("bfloat16", "float16", "float32"),
    "ssm_dtype": ("bfloat16", "float16", "float32"),
    "fp8_scale_dtype": ("bfloat16", "float32"),
}
"""Options with a few values."""


def problems_of(family: SmallModel, values: Mapping[str, Any], tokens: int) -> list[str]:
    """Every contradiction in `values` (by dotted key), for a tokenizer with ids below `tokens`."""
    layouts = dict.fromkeys(("experts", *family.expert_options.values()), tuple(ExpertLayout))
    problems = [
        f"{key} must be one of {', '.join(choices)}, found {values[key]!r}"
        for key, choices in {**CHOICES, **layouts}.items()
        if key in values and values[key] not in choices
    ]
    not_positive = [
        f"{key} must be positive, found {values[key]}"
        for key in (*family.positive, "max_shard_size")
        if key in values and values[key] < 1
    ]
    if not_positive:  # the family's checks divide
        return [*problems, *not_positive]
    problems += family.problems(values)
    vocabulary = f"{family.language}vocab_size"
    if values[vocabulary] < tokens:
        problems.append(
            f"{vocabulary} ({values[vocabulary]}) is smaller than the tokenizer's ({tokens})"
        )
    if values["num_shards"] < 0:
        problems.append(f"num_shards must not be negative, found {values['num_shards']}")
    if values["fp8"] and family.fp8_matrices is None:
        problems.append(f"fp8: family {family.name} has no FP8 release; leave it out")
    return problems
