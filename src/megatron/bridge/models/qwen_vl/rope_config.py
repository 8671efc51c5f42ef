"""The rotary embedding of the language model, as a config has it and transformers completes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import (
    MROPE_SECTION,
    PARTIAL_ROTARY_TYPES,
    language_of,
)
from megatron.bridge.text.quoting import quoted

_FORMS = ("rope_parameters", "rope_scaling")
"""Where the parameters stand: since transformers 5, and before it."""

_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the language model.

    Attributes:
        theta: the base.
        mrope_section: rotary frequencies of the axes (time, height, width), which always alternate;
            empty where a token has one position.
        partial_rotary_factor: the part of each head that is rotated, from its start.
        rope_type: how the frequencies are scaled.
        scaling: the parameters of that type, by the names that transformers gives them; empty for
            "default".
    """

    theta: float
    mrope_section: tuple[int, ...]
    partial_rotary_factor: float
    rope_type: str
    scaling: dict[str, Any]


def read_rope(config: HFConfig) -> Rope:
    """The language model's rotary embedding, of a whole model's config, in either form.

    The new form is `rope_parameters`, the old one `rope_scaling` and `rope_theta`.

    Raises:
        ConfigError: a value is no base, part or section, or it is stated twice and differently.
    """
    text = language_of(config)
    theta = text.agreed(_places("rope_theta", anywhere=True), text.positive)
    section = _mrope_section(text) if config.model_type in MROPE_SECTION else ()
    kind = _kind(text)
    rotated, places = 1.0, _places("partial_rotary_factor", anywhere=True)
    # Where heads are rotated as a whole, transformers reads it for scaled types all the same.
    scaled = kind != "default" and any(map(text.has, places))
    if config.model_type in PARTIAL_ROTARY_TYPES or scaled:
        rotated = text.agreed(places, partial(text.positive, limit=1.0))
    return Rope(theta, section, rotated, kind, _scaling(text, kind))


def _mrope_section(text: HFConfig) -> tuple[int, ...]:
    places = _places("mrope_section")
    section: list[Any] = list(MROPE_SECTION[text.root.model_type])
    if any(map(text.has, places)):
        section = text.agreed(places, partial(text.require, kind=list))
    if len(section) != 3 or not all(type(size) is int and size >= 0 for size in section):
        raise ConfigError(
            f"{text.origin}: {text.dotted(places[0])} must be a list of three counts, found "
            f"{quoted(section)}"
        )
    return tuple(section)


def vision_rope_settings(vision: HFConfig) -> dict[str, Any]:
    """Fields of the vision tower's rotation."""
    kind = _kind(vision, "axial")
    return {
        "rope_theta": vision.agreed(_places("rope_theta", anywhere=True), vision.positive),
        "rope_type": "axial" if kind == "default" else kind,
    }


def _kind(section: HFConfig, *more: str) -> str:
    """The type of a rotation. As in transformers, `type` counts where there is no `rope_type`.

    Args:
        section: the text or vision config.
        *more: types beside those of all models.

    Raises:
        ConfigError: transformers does not know the type, or the parameters are no object.
    """
    for form in _FORMS:
        if section.has(form):
            section.require(form, dict)
    places = _places("rope_type")
    if not any(map(section.has, places)):
        places += _places("type")
    kind = section.agreed(places, partial(section.require, kind=str))
    if kind not in (*_TYPES, *more):
        too = ", with which it reads mrope_section, too,"
        raise ConfigError(
            f"{section.origin}: transformers knows no rope_type {quoted(kind)} and cannot build "
            f"the model: set it to 'default'{too * (section.root.model_type in MROPE_SECTION)} or "
            f"to one of {', '.join(_TYPES[1:])}"
        )
    return kind


def _places(key: str, *, anywhere: bool = False) -> list[str]:
    """Where a parameter may stand in a text or vision config."""
    return [*(f"{form}.{key}" for form in _FORMS), *([key] if anywhere else [])]


def _scaling(text: HFConfig, kind: str) -> dict[str, Any]:
    if kind == "default":
        return {}
    completed = text.completed(_FORMS[0])
    known: dict[str, Any] = completed if isinstance(completed, dict) else {}
    if not known:  # transformers refuses the config, for whatever reason
        known = next((text.require(form, dict) for form in _FORMS if text.has(form)), {})
    return {key: value for key, value in known.items() if key not in _COMMON}


_COMMON = (
    "type",
    "rope_type",
    "rope_theta",
    "mrope_section",
    "mrope_interleaved",
    "partial_rotary_factor",
)
"""Parameters of every type."""
