"""JSON objects from files, refusing what a lenient parser would silently drop or let through."""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Any, NoReturn

from megatron.bridge.text.quoting import quoted

MAX_DEPTH = 64
"""Levels of nesting: far more than a config has, far from the limit of recursive code."""

MAX_MARKS = 8_000_000
"""Brackets, commas and colons: no more values than these, of up to 100 bytes of memory each.

A tensor in a header has 12 of them, and the largest headers have 100,000 tensors.
"""

_MAX_DIGITS = 4300
"""Digits of an integer, Python's own default: parsing takes their square in time."""


def parse_object(text: bytes, max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """Parse UTF-8 JSON text whose top level is an object.

    Args:
        text: the JSON.
        max_marks: the most values that it may have.

    Raises:
        ValueError: invalid UTF-8 or JSON, NaN and infinities, integers of over 4,300 digits,
            duplicate keys at any depth, more than MAX_DEPTH levels or `max_marks` values, or a top
            level that is not an object.
    """
    check_marks(text, max_marks)
    try:
        value = json.loads(
            _decoded(text),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_number,
            parse_int=_integer,
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


def check_marks(text: bytes, most: int) -> None:
    """Text of tiny values would take a hundred times its bytes. Marks in strings count, too."""
    if len(text) > most:
        marks = sum(map(text.count, (b"[", b"{", b",", b":")))
        if marks > most:
            raise ValueError(f"it has about {marks:,} values, the limit is {most:,}")


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
    raise ValueError(f"{text} is not a valid JSON number")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{quoted(text)} is a number with too many digits: {len(text):,}")
    return int(text)


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
