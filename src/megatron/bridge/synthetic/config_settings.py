"""Settings `key=value` of a synthetic model, applied to its family's config and checked.

Keys are the config's dotted paths, which the family may have shorter forms of, and the keys of
`OPTIONS`. Values may be of the right type or text, as from a command line. A nested
mapping, such as a real model's whole config.json, means the same as its dotted keys.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import InputError
from megatron.bridge.models.small_model import SmallModel
from megatron.bridge.synthetic.validation import problems_of

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

_FIXED = ("architectures", "model_type")
_ORDINARY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class DiskForm:
    """How the weights are stored; dtypes are torch's names.

    `experts` has an ExpertLayout by the option that names it, of families with experts; `ssm_dtype`
    is empty in one without such tensors. `scale_dtype` is that of the scales of FP8.
    """

    dtype: str
    ssm_dtype: str
    experts: Mapping[str, str]
    fp8: bool
    scale_dtype: str


@dataclass(frozen=True, slots=True)
class Settings:
    """A complete config.json (but for the quantization), and how to write the weights.

    `num_shards` 0 means: as many as `max_shard_size` (bytes) makes; `first_token_id` is the id of
    the family's first token.
    """

    config: dict[str, Any]
    form: DiskForm
    num_shards: int
    max_shard_size: int
    first_token_id: int


def resolve_settings(family: SmallModel, settings: Mapping[str, object]) -> Settings:
    """Apply `settings` to the config of `family`.

    Raises InputError for an unknown key (listing the known ones), a value of the wrong type, or
    values that do not make a model, all of them in one error.
    """
    defaults = dict(_flatten(family.config)) | dict(OPTIONS) | dict(family.options)
    fixed = (*_FIXED, *family.fixed)
    given: dict[str, Any] = {}
    for name, value in _flatten(settings):
        key = _full_key(family, name)
        if key not in defaults and key not in family.token_ids:
            raise _unknown(key, [*(defaults.keys() - set(fixed)), *family.token_ids])
        typed = _typed(key, defaults.get(key, 0), value)
        if given.setdefault(key, typed) != typed:
            raise InputError(f"{key} is set twice: to {given[key]!r}, and by {name} to {typed!r}")
    for key in fixed:
        if key in given and given[key] != defaults[key]:
            raise InputError(f"{key} of family {family.name} is {defaults[key]!r}, not a setting")
    if given.get("fp8", False):
        defaults |= family.fp8_options
    values = {**defaults, **given}
    _follow(family, given, values)
    first_token_id = _place_tokens(family, given, values)
    if problems := problems_of(family, values, first_token_id + len(family.tokens)):
        raise InputError.of_problems("these settings make no model", problems)
    options = OPTIONS.keys() | family.options.keys()
    of_config = {key: value for key, value in values.items() if key not in options}
    config = _unflatten(of_config | {f"{family.language}dtype": values["dtype"]})
    if values["rope_form"] == "old":
        _use_old_form_of_rope(family.language_of(config))
    form = DiskForm(
        dtype=values["dtype"],
        # Families without such tensors have no such option.
        ssm_dtype=values.get("ssm_dtype", ""),
        experts={
            option: values[option]
            for option in ("experts", *family.expert_options.values())
            if option in values
        },
        fp8=values["fp8"],
        scale_dtype=values["fp8_scale_dtype"],
    )
    return Settings(config, form, values["num_shards"], values["max_shard_size"], first_token_id)


def _follow(family: SmallModel, given: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Set the values that follow other ones, unless they are given on their own."""
    for follower, leader in family.follow.items():
        if follower in values:
            values[follower] = given.get(follower, values[leader])
    family.complete(given, values)


def _use_old_form_of_rope(language: dict[str, Any]) -> None:
    """Write as transformers did before version 5."""
    rope = language.pop("rope_parameters")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            language[key] = rope.pop(key)
    language["rope_scaling"] = rope


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
    return first


def _full_key(family: SmallModel, key: str) -> str:
    language = family.language
    rope = f"{language}rope_parameters."
    shorts = {**family.shorts, f"{language}rope_scaling.": rope}
    for short, full in shorts.items():
        if key.startswith(short):
            key = full + key.removeprefix(short)
    aliases = {
        "vocab_size": f"{language}vocab_size",
        f"{language}dtype": "dtype",
        f"{language}partial_rotary_factor": f"{rope}partial_rotary_factor",
        f"{language}rope_theta": f"{rope}rope_theta",
        **family.aliases,
    }
    return aliases.get(key, key)


def _unknown(key: str, known: list[str]) -> InputError:
    settable = sorted(known)
    close = difflib.get_close_matches(key, settable, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"unknown setting {key!r}{hint}; known are: {', '.join(settable)}")


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
