"""Names of parameters and tensors with ``*`` where a number stands: the layer, the expert."""

import re
from collections.abc import Sequence
from functools import cache

WILDCARD = "*"


def fill(pattern: str, numbers: Sequence[int | str]) -> str:
    """`pattern` with its wildcards replaced by `numbers`, in order.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    wildcards, template = _template(pattern)
    if wildcards != len(numbers):
        raise ValueError(f"{pattern} has {wildcards} wildcards, not {len(numbers)}")
    # Plans fill in names by the ten thousand; this is the fastest way there is.
    return template % tuple(numbers)


@cache
def _template(pattern: str) -> tuple[int, str]:
    return pattern.count(WILDCARD), pattern.replace(WILDCARD, "%s")


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Matches the names that `pattern` stands for; groups are the numbers."""
    return re.compile(r"(\d+)".join(re.escape(part) for part in pattern.split(WILDCARD)))
