"""The keys of a model type's configs, collected from the source of a transformers package.

The source is parsed, not imported, so that any version can be looked at: those that config classes
declare or take as keywords, and those that modeling code reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SECTIONS = ("", "text_config", "vision_config")

ANY_SECTION = "any"

type SectionKey = tuple[str, str]
"""("text_config", "hidden_size"); the section is empty for keys at the top."""

_NOT_OF_A_FILE = frozenset(
    {"_attn_implementation", "_experts_implementation", "get_text_config", "sub_configs"}
)
"""Read by code, and neither keys of a file nor values."""


class TransformersSource:
    """One transformers package, by its folder."""

    def __init__(self, package: Path) -> None:
        self._package = package

    def declared_keys(self, model_type: str) -> set[SectionKey]:
        """Fields of the config classes, other names of them, and keywords that they take."""
        base = self._class("configuration_utils.py", "PreTrainedConfig")
        rope = self._class("modeling_rope_utils.py", "RotaryEmbeddingConfigMixin")
        [start] = [n for n in base.body if getattr(n, "name", "") == "__post_init__"]
        found: set[SectionKey] = set()
        for section, node in self._configs(model_type).items():
            own = {*_fields(node), *_keywords(node), *_attribute_map(node)}
            common = {*_fields(base), *_keywords(start), *_keywords(rope)}
            found |= {(section, key) for key in own | common}
        return {(section, key) for section, key in found if key not in _NOT_OF_A_FILE}

    def read_keys(self, model_type: str) -> set[SectionKey]:
        """Attributes of configs that the modeling code reads.

        The section is that of the config class which the code around names, "any" where that
        cannot be told.
        """
        found: set[SectionKey] = set()
        for node in self._modeling(model_type).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            # Layers of the text model name the class of the whole config for their own.
            sections = {_section(name) or ANY_SECTION for name in _annotations(node)}
            for path in _attributes(node):
                section, _, key = path.rpartition(".")
                if section in SECTIONS[1:]:
                    found.add(("", section))
                    found.add((section, key))
                else:
                    found |= {(one, path.partition(".")[0]) for one in sections or {ANY_SECTION}}
        if is_text_of_another(model_type):
            found = {
                ("" if section == "text_config" else section, key)
                for section, key in found
                if section in ("text_config", ANY_SECTION)
            }
        return {(section, key) for section, key in found if key not in _NOT_OF_A_FILE}

    def mrope_section(self, model_type: str) -> list[int] | None:
        """The default in ``rope_parameters.get("mrope_section", [...])``; None if there is none."""
        tree = self._modeling(model_type)
        defaults = {
            ast.unparse(node.args[1])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and len(node.args) == 2
            and isinstance(node.args[0], ast.Constant)
            and node.args[0].value == "mrope_section"
        }
        if not defaults:
            return None
        [default] = defaults
        value: list[int] = ast.literal_eval(default)
        return value

    def rope_parameters(self) -> set[str]:
        """The parameters of a rotation that any code of a rope type reads."""
        tree = self._tree("modeling_rope_utils.py")
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript):
                owner, key = node.value, node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                owner, key = node.func.value, node.args[0]
            else:
                continue
            is_rope = "rope_parameters" in ast.unparse(owner)
            if is_rope and isinstance(key, ast.Constant) and isinstance(key.value, str):
                found.add(key.value)
        return found

    def _configs(self, model_type: str) -> dict[str, ast.ClassDef]:
        module = _module(model_type)
        tree = self._tree(f"models/{module}/configuration_{module}.py")
        found = {_section(n.name): n for n in tree.body if isinstance(n, ast.ClassDef)}
        return {"": found["text_config"]} if is_text_of_another(model_type) else found

    def _modeling(self, model_type: str) -> ast.Module:
        module = _module(model_type)
        return self._tree(f"models/{module}/modeling_{module}.py")

    def _class(self, file: str, name: str) -> ast.ClassDef:
        [node] = [
            n for n in self._tree(file).body if isinstance(n, ast.ClassDef) and n.name == name
        ]
        return node

    def _tree(self, file: str) -> ast.Module:
        return ast.parse((self._package / file).read_text(encoding="utf-8"))


def is_text_of_another(model_type: str) -> bool:
    """Whether the config of this type is also a section of another one, in the same module."""
    return model_type.endswith("_text")


def _module(model_type: str) -> str:
    return model_type.removesuffix("_text")


def _section(config_class: str) -> str:
    for word, section in (("Text", "text_config"), ("Vision", "vision_config")):
        if config_class.endswith(f"{word}Config"):
            return section
    return ""


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_field = "ClassVar" not in ast.unparse(statement.annotation)
            yield from [statement.target.id] * is_field


def _attribute_map(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if (
            isinstance(statement, ast.Assign)
            and ast.unparse(statement.targets[0]) == "attribute_map"
        ):
            for alias, name in ast.literal_eval(statement.value).items():
                yield from (alias, name)


def _keywords(node: ast.AST) -> Iterator[str]:
    """What code takes out of the keywords of a config: ``kwargs.pop("rope_theta", ...)``."""
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Call)
            and isinstance(inner.func, ast.Attribute)
            and inner.func.attr in ("pop", "get", "setdefault")
            and ast.unparse(inner.func.value) == "kwargs"
            and isinstance(inner.args[0], ast.Constant)
        ):
            yield inner.args[0].value


def _annotations(node: ast.AST) -> Iterator[str]:
    """Config classes that what is called `config` is annotated with."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg) and inner.arg == "config" and inner.annotation:
            annotation: ast.expr | None = inner.annotation
        elif isinstance(inner, ast.AnnAssign) and ast.unparse(inner.target) == "config":
            annotation = inner.annotation
        else:
            continue
        for name in ast.walk(annotation) if annotation else ():
            if isinstance(name, ast.Name) and name.id.endswith("Config"):
                yield name.id


def _attributes(node: ast.AST) -> Iterator[str]:
    """``hidden_size`` of ``config.hidden_size``; also of `getattr` and `hasattr`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute):
            path, value = [inner.attr], inner.value
            while isinstance(value, ast.Attribute) and value.attr in SECTIONS[1:]:
                path.insert(0, value.attr)
                value = value.value
            if _is_config(value):
                yield ".".join(path)
        elif (
            isinstance(inner, ast.Call)
            and ast.unparse(inner.func) in ("getattr", "hasattr")
            and _is_config(inner.args[0])
            and isinstance(inner.args[1], ast.Constant)
        ):
            yield inner.args[1].value


def _is_config(node: ast.AST) -> bool:
    """``config``, ``self.config``, ``self.config.get_text_config()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "get_text_config"
    return (getattr(node, "id", "") or getattr(node, "attr", "")) == "config"
