"""Numbers as people read them.

Units are powers of ten, as those of disks and of the hub; those with an i (MiB) are powers of 1024.
"""

from __future__ import annotations

from megatron.bridge.text.sizes import format_bytes


def format_rate(size: float, seconds: float) -> str:
    """A rate, as in ``1.10 GB/s``."""
    return f"{format_bytes(size / max(seconds, 1e-9))}/s"


def exactly(size: int) -> str:
    """A number of bytes, exact and in a unit, as in ``5,506,560 (5.51 MB)``."""
    return f"{size:,} ({format_bytes(size)})"


def exact_bytes(size: int) -> str:
    """A number of bytes as in running text: ``5,506,560 bytes (5.51 MB)``."""
    return f"{size:,} bytes ({format_bytes(size)})"


def count(number: int, noun: str) -> str:
    """A number of things, as in ``1 tensor`` or ``2 tensors``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
