"""Many names that differ only in numbers, shown as one: ``layers.{0...27}.mlp.weight``."""

import itertools
import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def fold(names: Iterable[str]) -> list[str]:
    """Names as patterns that stand for exactly these names, in the order of first appearance.

    Only whole components between dots are folded. Numbers that do not form a grid give several
    patterns: ``a.{0,1}`` is never shown where ``a.0`` and ``b.1`` were meant.
    """
    split = [(template(name), tuple(_NUMBER.findall(name))) for name in names]
    groups: dict[str, dict[tuple[str, ...], None]] = {}
    for pattern, numbers in split:
        groups.setdefault(pattern, {})[numbers] = None
    return [
        _fill(pattern, numbers)
        for pattern, members in groups.items()
        for numbers in _merge(list(members))
    ]


def fold_pattern(pattern: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A pattern with its wildcards ``*`` replaced by all rows of numbers, folded.

    Unlike in `fold`, a wildcard may be a part of a word: ``weight*`` becomes ``weight{0...7}``.
    Each row has a number for each wildcard, in order; more are passed over.
    """
    first, *rest = pattern.split("*")
    distinct = list(dict.fromkeys(tuple(row[: len(rest)]) for row in rows))
    if not distinct or not rest:
        return [pattern] * bool(distinct)
    return [
        first + "".join(number + part for number, part in zip(numbers, rest, strict=True))
        for numbers in _merge(distinct)
    ]


def fold_numbers(numbers: Iterable[int]) -> str:
    """``0...2,5`` for 0, 1, 2 and 5, in any order."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = (str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}...{b}" for a, b in runs)
    return ",".join(shown)


def template(name: str) -> str:
    """A name with every number that `fold` folds replaced by ``*``."""
    return _NUMBER.sub("*", name)


def fold_words(names: Sequence[str]) -> str:
    """Names that differ in one word as one: ``self_attn.{q,k,v}_proj.weight``."""
    if len(names) < 2:
        return "".join(names)
    start = _common_start(names)
    rests = [name.removeprefix(start) for name in names]
    end = _common_start([rest[::-1] for rest in rests])[::-1]
    words = [rest.removesuffix(end) for rest in rests]
    # Braces inside of braces would be hard to read.
    nested = start.count("{") != start.count("}") or any("{" in word for word in words)
    if not start or nested:
        return ", ".join(names)
    return start + "{" + ",".join(words) + "}" + end


def _common_start(names: Sequence[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _merge(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows of numbers as fewer rows of sets of numbers, one position after the other."""
    for position in reversed(range(len(rows[0]))):
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            others = row[:position] + row[position + 1 :]
            groups.setdefault(others, []).append(row[position])
        rows = [
            (*others[:position], _set_of(values), *others[position:])
            for others, values in groups.items()
        ]
    return rows


def _set_of(values: list[str]) -> str:
    """``["0", "1", "2", "5"]`` as ``{0...2,5}``; a single value as it is."""
    if len(values) == 1:
        return values[0]
    return "{" + fold_numbers(map(int, values)) + "}"


def _fill(pattern: str, numbers: tuple[str, ...]) -> str:
    parts = iter(numbers)
    return re.sub(r"(?<![^.])\*(?![^.])", lambda _: next(parts), pattern)
