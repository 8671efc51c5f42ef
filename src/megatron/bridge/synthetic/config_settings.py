"""Settings of a synthetic model: its family's config with other values, and options.

A setting is named by the dotted path of the config, a section by its name without "_config" too
("text.hidden_size"); where it is unique, by its last part. Values are of the type that the family
has there, or text as from a command line. A nested mapping, such as a real model's whole
config.json, means the same as its dotted keys.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.expert_layout import ExpertLayout
from megatron.bridge.models.hf_pretrained.transformers_defaults import (
    TransformersDefaults,
    value_at,
)
from megatron.bridge.models.small_model import SmallModel

ORIGIN = "these settings"
"""What the config comes from, in messages."""

OPTIONS: Mapping[str, Any] = {
    "rope_form": "old",  # or "new": rope_parameters instead of rope_scaling and rope_theta
    "dtype": "bfloat16",
    "fp8": False,
    "fp8_scale_dtype": "bfloat16",
    "num_shards": 0,  # 0: as many as max_shard_size makes
    "max_shard_size": 5_000_000_000,
}
"""Settings of every family that are no config keys, with their defaults.

A family has its own besides, where they have a meaning: `experts` and those of its
`expert_options`, the layout of experts on disk, and `ssm_dtype`, the dtype of the tensors that
released models have in float32.
"""

_DTYPES = ("bfloat16", "float16", "float32")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "rope_form": ("old", "new"),
    "dtype": _DTYPES,
    "ssm_dtype": _DTYPES,
    "fp8_scale_dtype": ("bfloat16", "float32"),
}
_LEAST = {"num_shards": 0, "max_shard_size": 1}

_FIXED = ("architectures", "model_type")
_ORDINARY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """What a model is made of.

    Attributes:
        config: the complete config.json, but for the quantization.
        options: the value of each of `OPTIONS` and of the family's.
        first_token_id: id of the first of the family's tokens.
        changed: whether a value of the family's config was set.
    """

    config: dict[str, Any]
    options: Mapping[str, Any]
    first_token_id: int
    changed: bool


def resolve_settings(family: SmallModel, settings: Mapping[str, object]) -> Settings:
    """Apply settings to the config of a family; whether that makes a model is not checked here.

    Args:
        family: the declaration of the family.
        settings: values by name, as this module describes them.

    Raises:
        InputError: a key is unknown (the message lists the known ones), set twice or not a setting,
            a value is of the wrong type, values contradict each other, or an option cannot have
            its value.
    """
    options = {**OPTIONS, **family.options}
    known = {**dict(_flatten(family.config)), **dict.fromkeys(family.token_ids, 0), **options}
    fixed = {key for key in known if key in family.fixed or key.rpartition(".")[2] in _FIXED}
    given: dict[str, Any] = {}
    for name, value in _flatten(settings):
        key = _full_key(family, name, known)
        if key not in known:
            raise _unknown(key, sorted(known.keys() - fixed))
        typed = _typed(key, known[key], value)
        if given.setdefault(key, typed) != typed:
            raise InputError(f"{key} is set twice: to {given[key]!r}, and by {name} to {typed!r}")
    for key in sorted(given.keys() & fixed):
        if given[key] != known[key]:
            raise InputError(f"{key} of family {family.name} is {known[key]!r}, not a setting")
    values = {**known, **(family.fp8_options if given.get("fp8") else {}), **given}
    for follower, leader in family.follow.items():
        if follower in known:
            values[follower] = given.get(follower, values[leader])
    _check_options(family, {key: values[key] for key in options})
    first_token_id = _place_tokens(family, given, values)
    of_config = {key: value for key, value in values.items() if key not in options}
    config = _unflatten({**of_config, f"{family.language}dtype": values["dtype"]})
    for key, leader in family.completed.items():
        if key not in given:
            _complete(config, key, leader)
    if values["rope_form"] == "old":
        _use_old_form_of_rope(family.language_of(config))
    changed = bool(given.keys() - options.keys())
    return Settings(config, {key: values[key] for key in options}, first_token_id, changed)


def _full_key(family: SmallModel, name: str, known: Container[str]) -> str:
    """The key that a setting means; a key that is not in `known` where it means none."""
    section, dot, rest = name.partition(".")
    if dot and f"{section}_config" in family.config:
        name = f"{section}_config.{rest}"
    name = name.replace("rope_scaling.", "rope_parameters.")
    own = name.removeprefix(family.language)
    if own in OPTIONS:
        return own
    same = TransformersDefaults(family.config).names
    for place in (name, f"{family.language}{own}", f"{family.language}rope_parameters.{own}"):
        for key in same(place):
            if key in known:
                return key
    return name


def _unknown(name: str, settable: list[str]) -> InputError:
    close = difflib.get_close_matches(name, settable, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"unknown setting {name!r}{hint}; known are: {', '.join(settable)}")


def _typed(key: str, default: Any, value: object) -> Any:
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{key} must be of type {kind.__name__}, found {value!r}") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or not _same_elements(default, value):
        raise InputError(f"{key} must be of type {kind.__name__}, like {default}; found {value!r}")
    return copy.deepcopy(value)


def _same_elements(default: Any, value: Any) -> bool:
    """Whether two lists hold the same type; true for anything else."""
    if not isinstance(default, list):
        return True
    kinds = {type(item) for item in default} or {int}
    return all(type(item) in kinds for item in value)


def _check_options(family: SmallModel, options: Mapping[str, Any]) -> None:
    layouts = dict.fromkeys(("experts", *family.expert_options.values()), tuple(ExpertLayout))
    for key, choices in {**_CHOICES, **layouts}.items():
        if key in options and options[key] not in choices:
            raise InputError(f"{key} must be one of {', '.join(choices)}, found {options[key]!r}")
    for key, least in _LEAST.items():
        if options[key] < least:
            raise InputError(f"{key} must be {least} or more, found {options[key]}")
    if options["fp8"] and family.fp8_matrices is None:
        raise InputError(f"fp8: family {family.name} has no FP8 release; leave it out")


def _place_tokens(family: SmallModel, given: Mapping[str, Any], values: dict[str, Any]) -> int:
    """Fill in the ids of tokens; any of them that is given places all of them."""
    places = {
        key: given[key] - family.tokens.index(token)
        for key, token in family.token_ids.items()
        if key in given
    }
    first = next(iter(places.values()), _ORDINARY_TOKENS)
    if any(place != first for place in places.values()) or first < _ORDINARY_TOKENS:
        raise InputError(
            f"the ids of tokens do not fit together: {', '.join(places)}; in family {family.name} "
            f"they follow one another, behind {_ORDINARY_TOKENS} ordinary ones: give only one"
        )
    for key, token in family.token_ids.items():
        values[key] = first + family.tokens.index(token)
    vocabulary, tokens = f"{family.language}vocab_size", first + len(family.tokens)
    if values[vocabulary] < tokens:
        raise InputError(
            f"{vocabulary} ({values[vocabulary]}) is smaller than the tokenizer's ({tokens})"
        )
    return first


def _complete(config: dict[str, Any], path: str, leader: str) -> None:
    """Set what transformers' config class makes of other values; `leader` is the first of them."""
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section.pop(key, None)
    defaults = TransformersDefaults(config)
    section[key] = defaults.completed(path)
    if section[key] is None:
        raise InputError(
            f"{path} follows {leader} ({value_at(config, leader)}), and transformers does not "
            f"complete it: {defaults.refusal}; set {path} on its own, or correct what it follows"
        )


def _use_old_form_of_rope(language: dict[str, Any]) -> None:
    """Write the rotation as transformers did before version 5."""
    rope = language.pop("rope_parameters")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            language[key] = rope.pop(key)
    language["rope_scaling"] = rope


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in sorted(values.items()):
        *parents, key = path.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = copy.deepcopy(value)
    return result
