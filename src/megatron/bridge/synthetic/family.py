"""What a family of models declares, for `make_model` to make one of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    `config` is its config.json, rope in the new form (`rope_parameters`); the ids of tokens are
    filled in, in `token_ids` by dotted key, from the order of `tokens`: those follow the ordinary
    vocabulary. The first `special_tokens` of them are special, which means left out when text is
    decoded. Of the config's keys, `fixed` (dotted) are no settings: the model exists only so.

    `options` are settings that are no config keys and belong to this family alone, or whose
    default differs in it; `fp8_options` are the defaults that differ in its FP8 release.

    Patterns (regular expressions, searched in names on disk): `zero_centred_norms` have weights
    around 0, since the model adds 1; `ssm_tensors` have the dtype `ssm_dtype`.
    """

    name: str
    config: Mapping[str, Any]
    tokens: tuple[str, ...]
    special_tokens: int
    token_ids: Mapping[str, str]
    tokenizer_class: str
    processor_class: str
    image_processor_type: str
    video_processor_type: str
    fixed: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    fp8_options: Mapping[str, Any] = field(default_factory=dict)
    zero_centred_norms: str | None = None
    ssm_tensors: str | None = None
