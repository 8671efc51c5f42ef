"""JSON objects from files, refusing what a lenient parser would silently drop or let through."""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Any, NoReturn

from megatron.bridge.quoting import quoted

MAX_DEPTH = 64
"""Levels of nesting: far beyond any honest file, far from the limit of recursive code."""


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON text whose top level is an object.

    Raises ValueError for invalid UTF-8 or JSON, NaN and infinities, integers of thousands of
    digits, duplicate keys at any depth, more than MAX_DEPTH levels, or a top level that is no
    object.
    """
    try:
        value = json.loads(
            _decoded(text),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_number,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"it is not JSON from {where} on") from None
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    if type(value) is not dict:
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    _check_depth(value)
    return value


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"0x{text[error.start]:02x} at offset {error.start}"
        raise ValueError(f"it is not UTF-8 text: byte {found}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        duplicate = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"duplicate key {quoted(duplicate)}")
    return result


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{quoted(text)} is too large a number")
    return number


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError("JSON is nested too deeply")
