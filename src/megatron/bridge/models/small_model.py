"""What a family declares for `make-model`: one of its models at a size for tests.

It is registered like a bridge: importing the module that declares it is all it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

type Values = Mapping[str, Any]
"""Of a config."""

type Parameters = Iterable[tuple[str, tuple[int, ...]]]
"""Names and shapes."""


def _nothing(*_: object) -> tuple[()]:
    return ()


def _no_files(_config: Values) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A family's small model. All but the first five fields have defaults for one of text alone.

    Attributes:
        name: what `make-model --family` calls it.
        config: its config.json, with the rotation in the new form (`rope_parameters`). The ids of
            tokens are filled in, in `token_ids`.
        tokens: beside the bytes, which have ids of their own before them.
        token_ids: dotted key of the config -> the token whose id stands there.
        tokenizer_class: of transformers; a byte-level one that takes `vocab` and `merges`.
        special_tokens: so many of the tokens, the first ones, are left out when text is decoded;
            None for all.
        end_tokens: those that end a text; the first of them ends a turn. None of them is needed.
        pad_token: pads a batch, and begins a text.
        generation: of generation_config.json, beside these tokens.
        chat_template: in jinja; empty for a base model.
        auto_model: the class of transformers that builds it.
        language: what dotted keys of the language model's config begin with.
        follow: keys that have the value of another, unless they are set.
        completed: keys whose value transformers' config class makes of the others, unless they are
            set -> the first of those.
        fixed: keys that are no settings: the model exists only so.
        options: settings that are no config keys and belong to this family alone, or whose default
            differs in it.
        fp8_options: the defaults that differ in its FP8 release.
        fp8_matrices: pattern of the matrices that its FP8 release quantizes; None without one.
        further_parameters: those of the files that transformers' class does not have; called with
            the config and a function from a config to the parameters of the class.
        expert_options: beginning of the names of routed experts -> the option that says how they
            lie; that of all others is "experts".
        zero_centred_norms: pattern of norms with weights around 0, since the model adds 1.
        ssm_tensors: pattern of the tensors that have the dtype of the option `ssm_dtype`.
        processors: further files, by name, each a JSON object; called with the config.
    """

    name: str
    config: Mapping[str, Any]
    tokens: tuple[str, ...]
    token_ids: Mapping[str, str]
    tokenizer_class: str
    special_tokens: int | None = None
    end_tokens: tuple[str, ...] = ()
    pad_token: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str = ""
    auto_model: str = "AutoModelForCausalLM"
    language: str = ""
    follow: Mapping[str, str] = field(default_factory=dict)
    completed: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    fp8_options: Mapping[str, Any] = field(default_factory=dict)
    fp8_matrices: str | None = None
    further_parameters: Callable[[Values, Callable[[Values], Parameters]], Parameters] = _nothing
    expert_options: Mapping[str, str] = field(default_factory=dict)
    zero_centred_norms: str | None = None
    ssm_tensors: str | None = None
    processors: Callable[[Values], Mapping[str, Any]] = _no_files

    def language_of(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the language model: the whole one, or a section of it."""
        for section in filter(None, self.language.split(".")):
            config = config[section]
        return config


REGISTERED_SMALL_MODELS: dict[str, SmallModel] = {}
"""Small models by name, as far as their modules were imported; see `models.catalog`."""


def register_small_models(*models: SmallModel) -> None:
    """Let `make-model` make these."""
    REGISTERED_SMALL_MODELS.update({model.name: model for model in models})
