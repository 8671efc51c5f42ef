"""config.json as plain JSON with strict access: nothing is filled in, an error names its key."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.quoting import is_name, quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_COUNT = (1 << 31) - 1

# These formats rotate the whole head and have no key to say otherwise.
_FULL_ROTARY_MODEL_TYPES = frozenset({"qwen3_vl", "qwen3_vl_moe"})


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the text model.

    `theta` is the base. `mrope_section` counts the rotary frequencies of the axes (time, height,
    width); `interleaved` says that they alternate instead of lying in three blocks. The first
    `partial_rotary_factor` of each head's dimensions is rotated.
    """

    theta: float
    mrope_section: tuple[int, ...]
    interleaved: bool
    partial_rotary_factor: float
    rope_type: str


class HFConfig:
    """A read-only view of a model's config.json, or of one object inside it.

    Keys are dotted paths ("text_config.num_hidden_layers"). A JSON null counts as absent, as it
    does in transformers. What was given is copied and never changed.
    """

    def __init__(self, data: Mapping[str, Any], origin: str, prefix: str = "") -> None:
        """`origin` and the dotted `prefix` are for error messages only."""
        self._data = copy.deepcopy(dict(data))
        self._prefix = prefix
        self.origin = origin
        """Where the config comes from: a path, or a description."""

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a config.json (or the folder that holds one); ConfigError if that is impossible."""
        if path.is_dir():
            path = path / CONFIG_FILE
        if path.suffix == ".safetensors":
            raise ConfigError(
                f"{path}: it holds weights and no config; give the folder that holds it, "
                f"{path.absolute().parent}"
            )
        try:
            return cls(parse_object(read_regular(path, MAX_CONFIG_BYTES)), str(path))
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file; is this a model folder?") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as a config: {error}") from error
        except ValueError as error:
            raise ConfigError(
                f"{path}: cannot be read as a config: {error}; mend it, or download it again"
            ) from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "config given as a dict") -> Self:
        """View a config that is at hand as a dict."""
        return cls(data, origin)

    @classmethod
    def from_transformers(cls, config: PretrainedConfig) -> Self:
        """View a transformers config object.

        An object made in memory does not say its architecture; then it is the one that
        transformers itself would load for its model type.
        """
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )

        data = config.to_dict()
        if not data.get("architectures"):
            architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
            if isinstance(architecture, str):
                data["architectures"] = [architecture]
        return cls(data, f"{type(config).__name__} object")

    @property
    def data(self) -> dict[str, Any]:
        """A copy of the JSON object."""
        return copy.deepcopy(self._data)

    @property
    def architecture(self) -> str:
        """The model class to load, the first of `architectures`."""
        names = self.require("architectures", list)
        if not names or not is_name(names[0]):
            raise ConfigError(
                f"{self.origin}: {self._dotted('architectures')} must be a list of class names, "
                f"found {quoted(names)}"
            )
        return str(names[0])

    @property
    def model_type(self) -> str:
        """The name under which transformers registers the config's class."""
        return self.require("model_type", str)

    @property
    def dtype(self) -> str:
        """The safetensors name of the dtype that the config states for the weights.

        It stands at the top or in `text_config`, as `dtype` or, before transformers 5, as
        `torch_dtype`. Raises ConfigError if none is stated, two differ, or it is no dtype.
        """
        stated = self.stated_dtypes()
        if not stated:
            raise ConfigError(f"{self.origin}: dtype is missing; name the dtype of the weights")
        if len(set(stated.values())) > 1:
            raise ConfigError(f"{self.origin}: contradictory dtypes: {stated}")
        return TORCH_NAMES[next(iter(stated.values()))]

    def stated_dtypes(self) -> dict[str, str]:
        """The torch names of the dtypes that the config states for the weights, by key.

        Raises ConfigError for one that is no dtype.
        """
        parents = ["", "text_config"]
        keys = [key for name in ("dtype", "torch_dtype") for key in _paths(name, parents)]
        stated = {key: self.require(key, str) for key in keys if self.has(key)}
        for key, name in stated.items():
            if name not in TORCH_NAMES:
                raise ConfigError(
                    f"{self.origin}: {key} is {quoted(name)}, which is no dtype of tensors; "
                    "expected the name of one, as in 'bfloat16'"
                )
        return stated

    @property
    def text(self) -> Self:
        """The view of `text_config`."""
        return self.section("text_config")

    @property
    def vision(self) -> Self:
        """The view of `vision_config`."""
        return self.section("vision_config")

    def section(self, path: str) -> Self:
        """The view of an object inside; its errors keep the full dotted path."""
        view = copy.copy(self)
        view._data = self._typed(path, dict)
        view._prefix = f"{self._dotted(path)}."
        return view

    def has(self, path: str) -> bool:
        """Whether the key is there and not null."""
        return self._find(path) is not None

    def require[T](self, path: str, kind: type[T]) -> T:
        """The value at `path`, of the JSON type `kind`: bool, int, float, str, list or dict.

        A whole number is accepted as float; true and false are not numbers. Raises ConfigError if
        the value is missing, null or of another type.
        """
        return copy.deepcopy(self._typed(path, kind))

    def _typed[T](self, path: str, kind: type[T]) -> T:
        """The value itself, see `require`."""
        value = self._find(path)
        if value is None:
            raise ConfigError(
                f"{self.origin}: {self._dotted(path)} is missing; expected a value of type "
                f"{kind.__name__}"
            )
        if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(
                f"{self.origin}: {self._dotted(path)} must be of type {kind.__name__}, "
                f"found {quoted(value)}"
            )
        return value

    def count(self, path: str, limit: int = MAX_COUNT, *, least: int = 1) -> int:
        """The number of something, or its size: a whole number from `least` to `limit`.

        Raises ConfigError for any other value, and if it is missing or null.
        """
        value = self.require(path, int)
        if not least <= value <= limit:
            raise ConfigError(
                f"{self.origin}: {self._dotted(path)} must be a number from {least} to {limit}, "
                f"found {quoted(value)}"
            )
        return value

    def positive(self, path: str, limit: float = inf) -> float:
        """A finite number above 0 and at most `limit`; as `count`, for what need not be whole."""
        value = self.require(path, float)
        if not (isfinite(value) and 0 < value <= limit):
            most = "finite" if limit == inf else f"at most {limit:g}"
            raise ConfigError(
                f"{self.origin}: {self._dotted(path)} must be a number above 0, and {most}; "
                f"found {quoted(value)}"
            )
        return value

    def list_of[T](self, path: str, kind: type[T], default: list[T] | None = None) -> list[T]:
        """The list at `path`, all of one JSON type, or `default` where there is one and no list.

        Raises ConfigError.
        """
        values = self.require(path, list) if default is None else self.get(path, list(default))
        if not all(type(value) is kind for value in values):
            raise ConfigError(
                f"{self.origin}: {self._dotted(path)} must be a list of {kind.__name__}, "
                f"found {quoted(values)}"
            )
        return values

    def get[T](self, path: str, default: T) -> T:
        """The value at `path`, of the type of `default`, or `default` where the key is absent.

        Only for keys that the format itself declares optional, with this default.
        """
        return self.require(path, type(default)) if self.has(path) else default

    def rope(self) -> Rope:
        """The text model's rotary embedding, of a whole model's config, in either form.

        New form: `text_config.rope_parameters`. Old form: `text_config.rope_scaling` and
        `text_config.rope_theta`. Raises ConfigError if a value is missing, no base or part of a
        rotation, or stated twice and differently.
        """
        text = self.text
        forms = [name for name in ("rope_parameters", "rope_scaling") if text.has(name)]
        if not forms:
            raise ConfigError(
                f"{self.origin}: {text._dotted('rope_parameters')} is missing, and so is its older "
                f"form {text._dotted('rope_scaling')}"
            )
        section = text._agreed("mrope_section", forms, partial(text.require, kind=list))
        if not section or not all(type(size) is int and size >= 0 for size in section):
            raise ConfigError(
                f"{self.origin}: {text._dotted(forms[0])}.mrope_section must be a list of counts, "
                f"found {quoted(section)}"
            )
        anywhere = [*forms, ""]
        full_rotary = self.model_type in _FULL_ROTARY_MODEL_TYPES and not any(
            text.has(path) for path in _paths("partial_rotary_factor", anywhere)
        )
        share = partial(text.positive, limit=1.0)
        return Rope(
            theta=text._agreed("rope_theta", anywhere, text.positive),
            mrope_section=tuple(section),
            interleaved=text._agreed("mrope_interleaved", forms, partial(text.require, kind=bool)),
            partial_rotary_factor=(
                1.0 if full_rotary else text._agreed("partial_rotary_factor", anywhere, share)
            ),
            rope_type=text._agreed("rope_type", forms, partial(text.require, kind=str)),
        )

    def _agreed[T](self, key: str, parents: Iterable[str], read: Callable[[str], T]) -> T:
        """The one value that all places which state `key` state, each read by its path."""
        paths = _paths(key, parents)
        stated = {path: read(path) for path in paths if self.has(path)}
        if not stated:
            return read(paths[0])  # raises, naming the first place
        first, *others = stated.values()
        if any(value != first for value in others):
            values = ", ".join(f"{self._dotted(path)} = {quoted(v)}" for path, v in stated.items())
            raise ConfigError(f"{self.origin}: contradictory values: {values}")
        return first

    def _dotted(self, path: str) -> str:
        return self._prefix + path

    def _find(self, path: str) -> Any:
        value: Any = self._data
        for key in path.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(key)
        return value


def _paths(key: str, parents: Iterable[str]) -> list[str]:
    return [f"{parent}.{key}" if parent else key for parent in parents]
