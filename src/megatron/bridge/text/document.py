"""Reports as documents: what a dataclass holds, in plain JSON values under the names of its fields.

A report is declared once, as a dataclass, and everything that is said of it comes from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

UNSTATED: Final = MappingProxyType({"unstated": True})
"""Metadata of a field that does not stand in the document."""

if TYPE_CHECKING:  # to a type checker they are what they derive from
    stated = property
    spread = property
else:

    class stated(property):
        """A property that stands in the document, after the fields."""

    class spread(stated):
        """A property whose entries stand in the document, each as if it were a field."""


def to_document(value: object) -> Any:
    """The plain JSON value of a report, or of anything in one.

    A dataclass gives an object of its fields but those that are UNSTATED, and of its `stated` and
    `spread` properties. None is null, and so is a number that is not finite; a path is its text, a
    member of an enumeration its value.

    Raises:
        TypeError: there is something that has no such form.
    """
    match value:
        case Enum():
            return to_document(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return value if isfinite(value) else None
        case Path():
            return str(value)
        case Mapping():
            return {str(key): to_document(entry) for key, entry in value.items()}
        case list() | tuple():
            return [to_document(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return dict(_entries(value))
    raise TypeError(f"a {type(value).__name__} has no form in a document")


def _entries(report: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(report):
        if "unstated" not in field.metadata:
            yield field.name, to_document(getattr(report, field.name))
    for name, declared in _properties(type(report)).items():
        entry = to_document(getattr(report, name))
        yield from entry.items() if isinstance(declared, spread) else [(name, entry)]


def _properties(kind: type) -> dict[str, object]:
    """Those of the bases come first."""
    found: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        found |= {name: one for name, one in vars(base).items() if isinstance(one, stated)}
    return found
