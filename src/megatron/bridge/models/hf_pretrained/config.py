"""config.json as plain JSON with strict access: an error names its key.

What the file leaves out and transformers fills in has the value that transformers' own config
class gives it; everything else that is missing is an error.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.models.hf_pretrained.transformers_defaults import (
    TransformersDefaults,
    value_at,
)
from megatron.bridge.text.quoting import is_name, quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
TEXT, VISION = "text_config", "vision_config"
"""Where transformers puts the configs of a model's parts, if it is more than a language model."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys of the dtype of the weights; transformers before 5 has the second."""
MAX_CONFIG_BYTES = 4 << 20
MAX_COUNT = (1 << 31) - 1


class HFConfig:
    """A read-only view of a model's config.json, or of one object inside it.

    Keys are dotted paths ("rope_parameters.rope_theta"). A JSON null counts as absent, as it
    does in transformers. A key that is absent has the value of transformers' own config class,
    where that has one. What was given is copied and never changed.
    """

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        """`origin` is for error messages only."""
        self._data = _copied(dict(data))
        self._prefix = ""
        self._defaults = TransformersDefaults(self._data)
        self._filled_in: dict[str, Any] = {}
        self.origin = origin
        """Where the config comes from: a path, or a description."""
        self.root = self
        """The whole config, of which this may be a part."""

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
        """View a transformers config object."""
        return cls(config.to_dict(), f"{type(config).__name__} object")

    @property
    def data(self) -> dict[str, Any]:
        """A copy of the JSON object."""
        return _copied(self._data)

    @property
    def architecture(self) -> str:
        """The model class to load, the first of `architectures`.

        Where the file names none, the one that transformers loads for the model type.
        """
        if not self.states("architectures") and (known := self._defaults.architecture):
            return known
        names = self.require("architectures", list)
        if not names or not is_name(names[0]):
            raise ConfigError(
                f"{self.origin}: {self.dotted('architectures')} must be a list of class names, "
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

        It stands at the top or in the language model's section, as `dtype` or, before transformers
        5, as `torch_dtype`.

        Raises:
            ConfigError: none is stated, two differ, or it is not the name of a dtype.
        """
        stated = self.stated_dtypes()
        if not stated:
            raise ConfigError(f"{self.origin}: dtype is missing; name the dtype of the weights")
        if len(set(stated.values())) > 1:
            raise ConfigError(f"{self.origin}: contradictory dtypes: {stated}")
        return TORCH_NAMES[next(iter(stated.values()))]

    def stated_dtypes(self) -> dict[str, str]:
        """The torch names of the dtypes that the config states for the weights, by key.

        Raises:
            ConfigError: one of them is not the name of a dtype.
        """
        parents = ("", f"{TEXT}.")
        keys = [parent + name for name in DTYPE_KEYS for parent in parents]
        stated = {key: self.require(key, str) for key in keys if self.has(key)}
        for key, name in stated.items():
            if name not in TORCH_NAMES:
                raise ConfigError(
                    f"{self.origin}: {key} is {quoted(name)}, which is not a valid dtype of "
                    "tensors; expected the name of one, as in 'bfloat16'"
                )
        return stated

    @property
    def path(self) -> str:
        """The dotted path of this view in the whole config; empty for the whole."""
        return self._prefix.removesuffix(".")

    @property
    def text(self) -> Self:
        """The view of the language model's section."""
        return self.section(TEXT)

    @property
    def vision(self) -> Self:
        """The view of the vision encoder's section."""
        return self.section(VISION)

    def section(self, path: str) -> Self:
        """The view of an object inside; its errors keep the full dotted path.

        Raises:
            ConfigError: the file does not state it: what is in it would all be invented.
        """
        if not self.has(path):
            raise self._missing(path, dict)
        view = copy.copy(self)
        view._data = self._typed(path, dict)
        view._prefix = f"{self.dotted(path)}."
        return view

    def has(self, path: str) -> bool:
        """Whether the file states the key, and not as null."""
        return self._find(path) is not None

    def states(self, path: str) -> bool:
        """Whether the file states the key, and neither as null nor as an empty list."""
        return self._find(path) not in (None, [])

    @property
    def filled_in(self) -> Mapping[str, Any]:
        """What was asked for, is not in the file, and transformers gave a value for, by path."""
        return self._filled_in

    def require[T](self, path: str, kind: type[T]) -> T:
        """The value at `path`, of one JSON type. A null counts as missing.

        Args:
            path: dotted path of the key.
            kind: bool, int, float, str, list or dict. A whole number is accepted as float; true and
                false are not numbers.

        Raises:
            ConfigError: the value is missing or of another type.
        """
        return _copied(self._typed(path, kind))

    def require_any(self, path: str) -> Any:
        """The value at `path`, of whatever JSON type. Raises ConfigError if it is missing."""
        return _copied(self._known(path, object))

    def completed(self, path: str) -> Any:
        """The value at `path` as transformers completes it, the stated parts included.

        None where transformers does not know the key, or refuses the config.
        """
        return _copied(self._defaults.completed(self.dotted(path)))

    def _typed[T](self, path: str, kind: type[T]) -> T:
        """The value itself, see `require`."""
        value = self._known(path, kind)
        if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(
                f"{self.origin}: {self.dotted(path)} must be of type {kind.__name__}, "
                f"found {quoted(value)}"
            )
        return value

    def count(self, path: str, limit: int = MAX_COUNT, *, least: int = 1) -> int:
        """The number of something, or its size: a whole number from `least` to `limit`.

        Raises:
            ConfigError: it is any other value, or missing.
        """
        value = self.require(path, int)
        if not least <= value <= limit:
            raise ConfigError(
                f"{self.origin}: {self.dotted(path)} must be a number from {least} to {limit}, "
                f"found {quoted(value)}"
            )
        return value

    def positive(self, path: str, limit: float = inf, *, least: float | None = None) -> float:
        """A finite number above 0, or from `least` on, and at most `limit`.

        As `count`, for what need not be whole.
        """
        value = self.require(path, float)
        fits = value > 0 if least is None else value >= least
        if not (isfinite(value) and fits and value <= limit):
            most = "finite" if limit == inf else f"at most {limit:g}"
            start = "above 0" if least is None else f"from {least:g} on"
            raise ConfigError(
                f"{self.origin}: {self.dotted(path)} must be a number {start}, and {most}; "
                f"found {quoted(value)}"
            )
        return value

    def list_of[T](self, path: str, kind: type[T]) -> list[T]:
        """The list at `path`, all of one JSON type. Raises ConfigError for anything else."""
        values = self.require(path, list)
        if not all(type(value) is kind for value in values):
            raise ConfigError(
                f"{self.origin}: {self.dotted(path)} must be a list of {kind.__name__}, "
                f"found {quoted(values)}"
            )
        return values

    def get[T](self, path: str, default: T) -> T:
        """The value at `path`, of the type of `default`, or `default` where the key is absent.

        Only for keys that transformers does not know: it has the defaults of all others.
        """
        return self.require(path, type(default)) if self.has(path) else default

    def agreed[T](self, paths: Sequence[str], read: Callable[[str], T]) -> T:
        """The one value that all of these places state, each read by its path.

        Where none is stated, it is what transformers fills in for the first.

        Raises:
            ConfigError: two differ; the message names the places.
        """
        stated = {path: read(path) for path in paths if self.has(path)}
        if not stated:
            return read(paths[0])
        first, *others = stated.values()
        if any(value != first for value in others):
            raise self._contradiction({self.dotted(path): v for path, v in stated.items()})
        return first

    def _known(self, path: str, kind: type) -> Any:
        """What the file states, or transformers fills in. Raises ConfigError if neither does."""
        value = self._find(path)
        if value is None:
            full = self.dotted(path)
            value = self._defaults.get(full)
            if value is None:
                raise self._missing(path, kind)
            self._filled_in[full] = value
        return value

    def _missing(self, path: str, kind: type) -> ConfigError:
        refused = self._defaults.refusal
        why = f" (transformers gives no default: {refused})" if refused else ""
        return ConfigError(
            f"{self.origin}: {self.dotted(path)} is missing; expected a value of type "
            f"{kind.__name__}{why}"
        )

    def dotted(self, path: str) -> str:
        """A path in this view as one of the whole config."""
        return self._prefix + path

    def _find(self, path: str) -> Any:
        """What the file states, under any name that transformers takes for the same value.

        Raises ConfigError if it states two that differ.
        """
        stated = {}
        for full in self._defaults.names(self.dotted(path)):
            value = value_at(self._data, full.removeprefix(self._prefix))
            if value is not None:
                stated[full] = value
        first, *others = stated.values() or [None]
        if any(value != first for value in others):
            raise self._contradiction(stated)
        return first

    def _contradiction(self, stated: Mapping[str, Any]) -> ConfigError:
        values = ", ".join(f"{path} = {quoted(value)}" for path, value in stated.items())
        return ConfigError(
            f"{self.origin}: contradictory values: {values}; remove the one that is wrong"
        )


def _copied(value: Any) -> Any:
    """A deep copy; of JSON, several times as fast as `copy.deepcopy`."""
    if type(value) is dict:
        return {key: _copied(one) for key, one in value.items()}
    if type(value) is list:
        return [_copied(one) for one in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return copy.deepcopy(value)
