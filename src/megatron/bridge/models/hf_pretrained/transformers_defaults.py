"""What transformers' own config classes fill in where a config.json leaves a key out.

Nothing of it is written down here. Plain defaults stand in the source of the installed classes,
which is parsed, not run: importing transformers takes seconds, and a config that leaves out a flag
should not. What only code computes (`layer_types`, the parameters of a rotation, a size that
follows another one) is asked of the class itself, which is imported then.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from megatron.bridge.text.quoting import quoted

_MAX_COUNT = 1 << 18
"""Layers, heads or labels: transformers makes lists of such lengths."""

_NOT_OF_THE_CLASS = ("architectures", "auto_map", "quantization_config", "transformers_version")

_ARCHITECTURES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)
"""Where transformers keeps them, in the order in which they are looked up."""


class TransformersDefaults:
    """Values of one config.json that transformers fills in, by dotted path."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """`data` is the whole config, and is not changed."""
        self._data = data
        self.refusal = ""
        """Why transformers itself does not take this config, once that is known."""

    def get(self, path: str) -> Any:
        """The value at a dotted path; None where transformers gives none.

        That is so for a key or model type that it does not know, and for a config that it refuses.
        """
        value = declared_defaults(self.model_type).get(path)
        return self.completed(path) if value is None else value

    def completed(self, path: str) -> Any:
        """The value as the class makes it of what is stated; None as for `get`."""
        return value_at(self._computed, path) if self.model_type else None

    def names(self, path: str) -> tuple[str, ...]:
        """All dotted paths that transformers takes for the same value, this one first."""
        return (path, *declared_aliases(self.model_type).get(path, ()))

    @property
    def model_type(self) -> str:
        """The model type that the config states, or an empty text."""
        stated = self._data.get("model_type")
        return stated if isinstance(stated, str) else ""

    @cached_property
    def architecture(self) -> str | None:
        """The class that transformers loads for the model type; None if it knows none.

        A class of models that take images comes before the one for their text alone.
        """
        names = (known.get(self.model_type) for known in _architectures())
        return next((name for name in names if isinstance(name, str)), None)

    @cached_property
    def _computed(self) -> Mapping[str, Any]:
        """The config as the class makes it; empty where it refuses."""
        if large := next(_large_counts(self._data), None):
            self.refusal = f"{large} is more than any model has"
            return {}
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if self.model_type not in CONFIG_MAPPING_NAMES:
            self.refusal = f"it does not know model_type {quoted(self.model_type)}"
            return {}
        data = copy.deepcopy(dict(self._data))  # classes change what they are given
        for key in ("model_type", *_NOT_OF_THE_CLASS):
            data.pop(key, None)
        try:
            with _quiet():
                made: dict[str, Any] = AutoConfig.for_model(self.model_type, **data).to_dict()
        except Exception as error:  # noqa: BLE001  (whatever its checks raise for such values)
            self.refusal = " ".join(str(error).split())[:300] or type(error).__name__
            return {}
        return made


@cache
def declared_defaults(model_type: str) -> Mapping[str, Any]:
    """Defaults in the source of a model type's config classes, by dotted path.

    Only literals: what is None there is filled in by code. Tuples become lists, as in JSON. Base
    and type of a rotation stand beside the fields, or in the class that all config classes share.
    """
    found: dict[str, Any] = {}
    for prefix, node in _config_classes(model_type).items():
        declared = _assigned(node, fields=True)
        found |= {f"{prefix}{key}": value for key, value in declared.items()}
        if "rope_parameters" in declared:
            rope = {**_defaults_of_rotations(), **_assigned(node)}
            for key, name in (("rope_theta", "default_theta"), ("rope_type", "default_rope_type")):
                if name in rope:
                    found[f"{prefix}rope_parameters.{key}"] = rope[name]
    return found


@cache
def declared_aliases(model_type: str) -> Mapping[str, tuple[str, ...]]:
    """Other dotted paths of the same value, from the `attribute_map` of the config classes."""
    found: dict[str, tuple[str, ...]] = {}
    for prefix, node in _config_classes(model_type).items():
        for alias, name in _assigned(node).get("attribute_map", {}).items():
            pair = (f"{prefix}{alias}", f"{prefix}{name}")
            for one, other in (pair, pair[::-1]):
                found[one] = (*found.get(one, ()), other)
    return found


@cache
def _config_classes(model_type: str) -> Mapping[str, ast.ClassDef]:
    """The source of a model type's config class, and of those inside by their prefix.

    The config of a part of a model stands in the module of that model, whose name is shorter.
    """
    name = model_type.replace("-", "_")
    while name.isidentifier():
        classes = _classes_in(f"models/{name}/configuration_{name}.py")
        for node in classes.values():
            if _assigned(node).get("model_type") == model_type:
                inside = _sections(node).items()
                sections = {f"{key}.": classes[one] for key, one in inside if one in classes}
                return {"": node} | sections
        name = name.rpartition("_")[0]
    return {}


@cache
def _defaults_of_rotations() -> Mapping[str, Any]:
    """What the class that fills in the parameters of rotations takes where a config has none."""
    node = _classes_in("modeling_rope_utils.py").get("RotaryEmbeddingConfigMixin")
    return {} if node is None else _assigned(node)


@cache
def _architectures() -> Sequence[Mapping[str, Any]]:
    """Tables of classes by model type, which torch is needed to import."""
    tables = {}
    for statement in _statements_in("models/auto/modeling_auto.py"):
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(args=[ast.List() as pairs])
            ):
                with contextlib.suppress(ValueError, TypeError):
                    tables[name] = dict(ast.literal_eval(pairs))
    return [tables.get(name, {}) for name in _ARCHITECTURES]


def _classes_in(file: str) -> dict[str, ast.ClassDef]:
    """The source of the classes in a file of the installed package; none if it is not there."""
    return {node.name: node for node in _statements_in(file) if isinstance(node, ast.ClassDef)}


def _statements_in(file: str) -> Sequence[ast.stmt]:
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return []
    path = Path(next(iter(package.submodule_search_locations)), file)
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []  # then the class itself says it


def _assigned(node: ast.ClassDef, *, fields: bool = False) -> dict[str, Any]:
    """Literals of a class by name: of its annotated fields, or of its plain attributes."""
    found = {}
    for statement in node.body:
        target: ast.expr
        if fields and isinstance(statement, ast.AnnAssign):
            target, value = statement.target, statement.value
        elif not fields and isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        else:
            continue
        if isinstance(target, ast.Name) and value is not None:
            with contextlib.suppress(ValueError):
                literal = ast.literal_eval(value)
                found[target.id] = list(literal) if isinstance(literal, tuple) else literal
    return found


def _sections(node: ast.ClassDef) -> dict[str, str]:
    """Key of a config inside -> name of its class, from `sub_configs_defaults`."""
    for statement in node.body:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id == "sub_configs_defaults"
            and isinstance(statement.value, ast.Dict)
        ):
            return {
                str(key.value): value.id
                for key, value in zip(statement.value.keys, statement.value.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
            }
    return {}


def _large_counts(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _large_counts(value, f"{prefix}{key}.")
        elif type(value) is int and value > _MAX_COUNT and (key == "depth" or key[:4] == "num_"):
            yield f"{prefix}{key} = {quoted(value)}"


def value_at(data: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of a JSON object; None where there is none."""
    value: Any = data
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice: what a config lacks is shown by those who ask."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
