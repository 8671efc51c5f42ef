"""Fields of untrusted JSON: exactly the expected keys, of exactly these types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

MAX_INTEGER = (1 << 63) - 1
"""No size or time in a record is larger."""


def fields(value: object, types: Mapping[str, type | tuple[type, ...]]) -> list[Any]:
    """The values of a JSON object that has the keys of `types` and no other, in their order.

    Args:
        value: the object.
        types: the type, or types, of each value by its key. An integer is at least 0 and at most
            MAX_INTEGER; a boolean is not one.

    Raises:
        ValueError: the value is anything else.
    """
    if type(value) is not dict or value.keys() != types.keys():
        found = sorted(value) if type(value) is dict else type(value).__name__
        raise ValueError(f"expected an object of {sorted(types)}, found {str(found)[:200]}")
    for name, wanted in types.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if type(value[name]) not in allowed:
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{name}: expected {names}, found {type(value[name]).__name__}")
        if type(value[name]) is int and not 0 <= value[name] <= MAX_INTEGER:
            raise ValueError(f"{name}: {value[name]} is out of range")
    return [value[name] for name in types]


def is_file_name(name: str) -> bool:
    """Whether a name, with "/" between folders, is that of a file inside a folder."""
    try:
        os.fsencode(name)
    except UnicodeError:
        return False
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
