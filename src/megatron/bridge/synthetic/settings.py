"""Settings `key=value` of a synthetic model, applied to its family's config and checked.

Keys are the config's dotted paths, with `text.` and `vision.` short for the two sub-configs, and
the keys of `OPTIONS`. Values may be of the right type or text, as from a command line. A nested
mapping, such as a real model's whole config.json, means the same as its dotted keys.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import InputError
from megatron.bridge.synthetic.families import Family
from megatron.bridge.synthetic.validation import problems_of

OPTIONS: Mapping[str, Any] = {
    "rope_form": "old",  # or "new": rope_parameters instead of rope_scaling and rope_theta
    "dtype": "bfloat16",
    "num_shards": 0,  # 0: as many as max_shard_size makes
    "max_shard_size": 5_000_000_000,
}
"""Settings that are no config keys, with their defaults."""

_CHOICES = {"rope_form": ("old", "new"), "dtype": ("bfloat16", "float16", "float32")}
_SHORT = {"text.": "text_config.", "vision.": "vision_config."}
_ALIASES = {"vocab_size": "text_config.vocab_size", "text_config.dtype": "dtype"}
_FIXED = ("architectures", "model_type", "text_config.model_type", "vision_config.model_type")
_ORDINARY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """A complete config.json, and how to write the weights.

    `dtype` is torch's name; `num_shards` 0 means: as many as `max_shard_size` (bytes) makes;
    `first_token_id` is the id of the family's first token.
    """

    config: dict[str, Any]
    dtype: str
    num_shards: int
    max_shard_size: int
    first_token_id: int


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """Settings from `key=value` texts; InputError for one without `=` or a key given twice."""
    settings: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"a setting is key=value, found {text!r}")
        if key in settings:
            raise InputError(f"the setting {key} is given twice")
        settings[key] = value
    return settings


def resolve_settings(family: Family, settings: Mapping[str, object]) -> Settings:
    """Apply `settings` to the config of `family`.

    Raises InputError for an unknown key (listing the known ones), a value of the wrong type, or
    values that do not make a model, all of them in one error.
    """
    defaults = dict(_flatten(family.config)) | dict(OPTIONS)
    given: dict[str, Any] = {}
    for name, value in _flatten(settings):
        key = _full_key(name)
        if key not in defaults and key not in family.token_ids:
            raise _unknown(key, [*defaults, *family.token_ids])
        typed = _typed(key, defaults.get(key, 0), value)
        if given.setdefault(key, typed) != typed:
            raise InputError(f"{key} is set twice: to {given[key]!r}, and by {name} to {typed!r}")
    for key in _FIXED:
        if key in given and given[key] != defaults[key]:
            raise InputError(f"{key} of family {family.name} is {defaults[key]!r}, not a setting")
    values = {**defaults, **given}
    # Values that follow another one unless they are set on their own.
    values["text_config.dtype"] = values["dtype"]
    for follower, leader in (
        ("text_config.tie_word_embeddings", "tie_word_embeddings"),
        ("vision_config.out_hidden_size", "text_config.hidden_size"),
    ):
        values[follower] = given.get(follower, values[leader])
    first_token_id = _place_tokens(family, given, values)
    problems = [
        f"{key} must be one of {', '.join(choices)}, found {values[key]!r}"
        for key, choices in _CHOICES.items()
        if values[key] not in choices
    ]
    problems += problems_of(values, first_token_id + len(family.tokens))
    if problems:
        raise InputError("these settings make no model:" + "".join(f"\n  - {p}" for p in problems))
    config = _unflatten({key: value for key, value in values.items() if key not in OPTIONS})
    if values["rope_form"] == "new":
        text = config["text_config"]
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    return Settings(
        config, values["dtype"], values["num_shards"], values["max_shard_size"], first_token_id
    )


def _place_tokens(family: Family, given: Mapping[str, Any], values: dict[str, Any]) -> int:
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


def _full_key(key: str) -> str:
    for short, full in _SHORT.items():
        if key.startswith(short):
            key = full + key.removeprefix(short)
    return _ALIASES.get(key, key)


def _unknown(key: str, known: list[str]) -> InputError:
    settable = sorted(name for name in known if name not in _FIXED)
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
