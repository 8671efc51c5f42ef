"""Numbers as people read and write them.

Units are powers of ten, as those of disks and of the hub; those with an i (MiB) are powers of 1024.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([kmgt]i?)?b)?", re.ASCII | re.IGNORECASE)
_PREFIXES = {
    prefix + i: base**power
    for i, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt", 1)
}


def parse_size(text: str) -> int:
    """Bytes: ``1GiB``, ``512 MiB``, ``2GB``, ``1.5GB``, ``200KB``, or ``1000000``.

    Raises ValueError for anything else, such as a unit without its B, or less than one byte.
    """
    if match := _SIZE.fullmatch(text.strip()):
        number, prefix = match.groups()
        size = int(Fraction(number) * (_PREFIXES[prefix.lower()] if prefix else 1))
        if size:
            return size
    raise ValueError(f"{text[:40]!r} is no size; write it as 512MiB, 1GiB or 2GB, or in bytes")


def format_bytes(size: float) -> str:
    """``8.88 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_rate(size: float, seconds: float) -> str:
    """``1.10 GB/s``."""
    return f"{format_bytes(size / max(seconds, 1e-9))}/s"


def gigabytes_per_second(size: int, seconds: float) -> float:
    """10^9 bytes per second."""
    return size / 1e9 / max(seconds, 1e-9)


def count(number: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
