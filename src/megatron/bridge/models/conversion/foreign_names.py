"""Names that are not the model's: of adapters, of a wrapper, of another program."""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache

from megatron.bridge.text.folding import join_numbers, split_numbers

_ADAPTER = re.compile(r"(^|\.)(lora_|base_layer\b|modules_to_save\b|original_module\b)")
_MERGE = "merge the adapter into its base model (merge_and_unload) and save that"
_MOST_OF = 0.9
_MANY = 4


def other_names(
    needed: Collection[str], missing: Collection[str], extra: Sequence[str]
) -> str | None:
    """Why all that is missing is there under other names, in a sentence; None if it is not.

    Args:
        needed: names of all tensors that the model has.
        missing: those of them that are not in the files.
        extra: names in the files that are not the model's.
    """
    if not missing or not extra:
        return None
    if len(missing) == len(needed):
        if all(map(_ADAPTER.search, extra)):
            return (
                f"all {len(extra)} tensors are of an adapter, such as {extra[0]}; merge it into "
                f"its base model (merge_and_unload) and save that"
            )
        return (
            f"none of the {len(extra)} names is one of this model's: the files begin with "
            f"{extra[0]}, the model with {next(iter(needed))}; they are of another model, or "
            f"written by another program in names of its own"
        )
    return _word_too_much(needed, missing, extra) or _other_word(missing, extra)


def _word_too_much(
    needed: Collection[str], missing: Collection[str], extra: Sequence[str]
) -> str | None:
    """A wrapper of a training program that left its name inside of those of the tensors."""
    known = {word for name in needed for word in name.split(".")}
    words = Counter(word for name in extra for word in dict.fromkeys(name.split(".")))
    for word, count in words.most_common():
        if word in known or word.isdecimal() or count < len(missing) * _MOST_OF / 2:
            continue
        wrapped = [name for name in extra if f"{word}." in name]
        without = {name.replace(f"{word}.", "", times) for name in wrapped for times in (1, -1)}
        hits = sum(name in without for name in missing)
        if hits < _MOST_OF * len(missing):
            continue
        example = wrapped[0]
        if _ADAPTER.search(example):
            return (
                f"these are adapter weights that are not merged: {hits} names have {word}., such "
                f"as {example}; {_MERGE}"
            )
        return (
            f"{hits} names have {word}. in their middle, such as {example}; save the model that is "
            f"wrapped, not its wrapper"
        )
    adapters = [name for name in extra if _ADAPTER.search(name)]
    if len(adapters) >= len(missing) * _MOST_OF:
        return f"these are adapter weights that are not merged, such as {adapters[0]}; {_MERGE}"
    return None


def _other_word(missing: Collection[str], extra: Sequence[str]) -> str | None:
    """One word of many names stands where the model has another."""
    if len(missing) < _MANY:
        return None
    unused = set(extra)
    words = next(iter(missing)).split(".")
    for other in extra:
        others = other.split(".")
        if len(others) != len(words):
            continue
        unlike = [n for n, pair in enumerate(zip(words, others, strict=True)) if len({*pair}) > 1]
        if len(unlike) != 1 or words[unlike[0]].isdecimal():
            continue
        old, new = words[unlike[0]], others[unlike[0]]
        swapped = (
            ".".join(new if word == old else word for word in name.split(".")) for name in missing
        )
        hits = sum(name in unused for name in swapped)
        if hits >= _MOST_OF * len(missing):
            return (
                f"{hits} names have {new} where this model has {old}, such as {other}; convert "
                f"them to the names of transformers first"
            )
    return None


def renamed_tensors(missing: Iterable[str], unexpected: Collection[str]) -> dict[str, str]:
    """The name in the files that a missing tensor may have: alike, and with the same numbers."""
    patterns = {split_numbers(name)[0]: None for name in unexpected}
    alike = {"".join(words): words for words in patterns}

    @cache
    def closest(pattern: str) -> list[str]:
        return difflib.get_close_matches(pattern, alike, n=3, cutoff=0.8)

    found = {}
    for name in missing if alike else ():
        words, numbers = split_numbers(name)
        others = (alike[pattern] for pattern in closest("".join(words)))
        likely = (join_numbers(other, numbers) for other in others if len(other) == len(words))
        if hit := next((other for other in likely if other in unexpected), None):
            found[name] = hit
    return found
