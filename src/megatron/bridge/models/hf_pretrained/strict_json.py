"""JSON objects from files, refusing what a lenient parser would silently drop."""

from __future__ import annotations

import json
from typing import Any


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"duplicate key(s): {', '.join(duplicates)}")
    return result


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON text whose top level is an object.

    Raises ValueError for invalid UTF-8 or JSON, duplicate keys at any depth, nesting too deep to
    parse, or a top level that is no object.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    if type(value) is not dict:
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value
