"""Sizes in bytes as people read and write them.

Units are powers of ten, as those of disks and of the hub; those with an i (MiB) are powers of 1024.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron.bridge.errors import InputError

type Size = int | str
"""Bytes, or a text as `parse_size` takes it."""

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([kmgt]i?)?b)?", re.ASCII | re.IGNORECASE)
_PREFIXES = {
    prefix + i: base**power
    for i, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt", 1)
}


def parse_size(text: str) -> int:
    """Bytes: ``1GiB``, ``512 MiB``, ``2GB``, ``1.5GB``, ``200KB``, or ``1000000``.

    Raises:
        ValueError: anything else, such as a unit without its B, or less than one byte.
    """
    if match := _SIZE.fullmatch(text.strip()):
        number, prefix = match.groups()
        size = int(Fraction(number) * (_PREFIXES[prefix.lower()] if prefix else 1))
        if size:
            return size
    raise ValueError(
        f"{text[:40]!r} is not a valid size; write it as 512MiB, 1GiB or 2GB, or in bytes"
    )


def size_of(size: Size, option: str) -> int:
    """The bytes that were given to an option. Raises InputError that names it."""
    if type(size) is int and size > 0:
        return size
    try:
        return parse_size(size if isinstance(size, str) else repr(size))
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


def format_bytes(size: float) -> str:
    """``8.88 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
