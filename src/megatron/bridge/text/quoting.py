"""Untrusted text in messages: short, on one line, and without control of the terminal.

Names and values in a file can be megabytes long, hold line feeds that forge a message, or escape
sequences that rewrite the screen.
"""

from __future__ import annotations

from reprlib import Repr

MAX_NAME = 1024
"""Characters of the longest name of a tensor that is read."""

_LONGEST = 120

quoted = Repr(
    maxlevel=3, maxtuple=8, maxlist=8, maxdict=4, maxstring=_LONGEST, maxlong=_LONGEST,
    maxother=_LONGEST,
).repr  # fmt: skip
"""``repr``, cut to what a person reads."""


def is_name(text: object) -> bool:
    """Whether a value can be the name of a tensor: a string, printable, and not endless."""
    return isinstance(text, str) and len(text) <= MAX_NAME and text.isprintable()


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would obey, line feeds included."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
