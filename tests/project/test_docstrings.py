"""Docstrings speak one dialect: what takes more than a line is said in Google's sections.

Ruff looks at the form of sections (its rules D and D417). Here: nothing of them is said in running
text, ``name: meaning.`` or "Raises X.", and they describe no name that is not there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron.bridge.errors

SOURCE = Path(megatron.bridge.errors.__file__).parent
SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:", "Attributes:")

type Documented = ast.FunctionDef | ast.ClassDef


def _parameters(node: ast.FunctionDef) -> set[str]:
    every = node.args
    starred = [one.arg for one in (every.vararg, every.kwarg) if one is not None]
    return {one.arg for one in (*every.posonlyargs, *every.args, *every.kwonlyargs)} | {*starred}


def _known(node: Documented) -> set[str]:
    """Names that its docstring may describe: parameters, of a class also attributes."""
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name | ast.Attribute):
            names.add(inner.target.id if isinstance(inner.target, ast.Name) else inner.target.attr)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names.add(inner.attr)
        elif isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            names |= _parameters(inner)
    return names


def _parts(docstring: str) -> tuple[str, list[str]]:
    """The running text, and the entries of Args and Attributes."""
    text, entries, section = [], [], ""
    for line in docstring.splitlines():
        if line in SECTIONS:
            section = line
        elif line and not line.startswith(" "):
            section = ""
        if not section:
            text.append(line)
        elif section in ("Args:", "Attributes:") and (entry := re.match(r" {4}\**(\w+): ", line)):
            entries.append(entry[1])
    return "\n".join(text), entries


def faults(node: Documented) -> Iterator[str]:
    """What of a docstring is not said in sections, or is said of nothing."""
    docstring = ast.get_docstring(node) or ""
    text, entries = _parts(docstring)
    known = _known(node)
    in_text = re.findall(r"(?:^|[.,;]\s)(\w+)(?:, \w+)*: ", text, re.MULTILINE)
    yield from (f"{name} stands in the text" for name in in_text if name in known)
    yield from (f"{name} is not there" for name in entries if name not in known)
    if "\n" in docstring and re.search(r"\bRaises? [A-Z]\w+", text):
        yield "what it raises stands in the text"


def _public(path: Path) -> Iterator[Documented]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def test_sections_say_what_takes_more_than_a_line() -> None:
    found, seen = [], 0
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for node in _public(path):
            seen += 1
            found += [f"{name}:{node.lineno} {node.name}: {fault}" for fault in faults(node)]
    assert not found, "\n".join(found)
    assert seen > 300, "nearly nothing was looked at"


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("It reads. Raises ValueError.", None),
        ("It reads.\n\n    Raises ValueError.", "what it raises stands in the text"),
        ("It reads.\n\n    size: of it. part: of it.", "size stands in the text"),
        ("It reads.\n\n    Args:\n        size: of it.", None),
        ("It reads.\n\n    Args:\n        gone: of it.", "gone is not there"),
    ],
)
def test_faults_are_found(docstring: str, fault: str | None) -> None:
    (node,) = ast.parse(f'def read(size, part):\n    """{docstring}"""\n').body
    assert isinstance(node, ast.FunctionDef)
    assert list(faults(node))[:1] == ([] if fault is None else [fault])
