"""Many names that differ only in numbers, shown as one: ``layers.{0...27}.mlp.weight``."""

import itertools
import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]*)(?![^.])")

# Inside of a sentence. megatron-core numbers the experts of a layer as weight0, weight1, ...
# That a digit follows is looked at first, in a third of the time: most places are passed over.
_NUMBER_IN_TEXT = re.compile(
    r"(?=[0-9])(?:(?<=[A-Za-z_]\.)|(?<=\.weight)|(?<=\.bias))(0|[1-9][0-9]*)(?!\w)"
)

_MOST_LINES = 3
_LONGEST_LINE = 2000


def fold(names: Iterable[str]) -> list[str]:
    """Names as patterns that stand for exactly these names, in the order of first appearance.

    Only whole components between dots are folded. Numbers that do not form a grid give several
    patterns: ``a.{0,1}`` is never shown where ``a.0`` and ``b.1`` were meant.
    """
    return _fold(names, _NUMBER)


def fold_texts(texts: Iterable[str]) -> list[str]:
    """Sentences that differ only in the layers and experts of the names in them, folded.

    Names in one sentence whose numbers are always the same count together:
    ``h.{0,1}.q: missing, needed for layers.{0,1}.qkv`` stands for two sentences, not for four.
    """
    return _fold(texts, _NUMBER_IN_TEXT)


def listing(problems: Iterable[str]) -> str:
    """Problems as the lines of a message, as `fold_texts` shows them.

    However many there are, a person can read it: a few lines, and how many are left out.
    """
    lines = fold_texts(problems)
    shown = [
        line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
        for line in lines[:_MOST_LINES]
    ]
    more = len(lines) - len(shown)
    return "\n".join(
        [
            *(f"  - {line}" for line in shown),
            *([f"  and {more} more (--json lists all)"] if more else []),
        ]
    )


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


def split_numbers(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A name as what stands around the numbers that `fold` folds, and these numbers."""
    return _split(name, _NUMBER)


def join_numbers(words: Sequence[str], numbers: Sequence[str]) -> str:
    """The name that `split_numbers` splits so."""
    return "".join(itertools.chain.from_iterable(zip(words, (*numbers, ""), strict=True)))


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


def _fold(texts: Iterable[str], number: re.Pattern[str]) -> list[str]:
    groups: dict[tuple[str, ...], dict[tuple[str, ...], None]] = {}
    for text in texts:
        words, numbers = _split(text, number)
        groups.setdefault(words, {})[numbers] = None
    return [
        join_numbers(words, merged)
        for words, rows in groups.items()
        for merged in _merge_repeated(words, list(rows))
    ]


def _split(text: str, number: re.Pattern[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parts = number.split(text)  # a group of the pattern: the numbers stand between the words
    return tuple(parts[::2]), tuple(parts[1::2])


def _merge_repeated(words: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """`_merge`, with numbers that repeat those of an earlier name in all rows left out of it.

    The `words` stand before each number, and behind the last one. A name has no spaces.
    """
    columns = list(zip(*rows, strict=True))
    name_of = list(itertools.accumulate(word.count(" ") for word in words[:-1]))
    first: list[int] = []
    for place, column in enumerate(columns):
        earlier = (p for p in first if name_of[p] != name_of[place] and columns[p] == column)
        first.append(next(earlier, place))
    own = sorted(set(first))
    merged = _merge([tuple(row[place] for place in own) for row in rows])
    return [tuple(row[own.index(place)] for place in first) for row in merged]


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
