"""The cause of tensors that are missing or of another shape: the one that a person can act on.

A stale number in config.json, a part that was left out or a prefix of all names make hundreds of
tensors wrong. What is said is the cause; tensors are named where there is none that explains them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.patterns import WILDCARD
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.folding import fold_numbers

_SIZE = re.compile(r"(?P<times>\d*)(?P<symbol>[A-Za-z]+)")
_ADAPTER = re.compile(r"(^|\.)(lora_|base_layer\b|modules_to_save\b|original_module\b)")
_MOST_OF = 0.9
_MANY = 4


@dataclass(frozen=True)
class Terms:
    """The words of a family, for messages.

    parts: root of Hugging Face names -> (what that part is called, what to do without it), longer
        roots first.
    counts: Megatron path before a wildcard -> (key of the config, what it counts).
    sizes: symbol of a shape -> key of the config.
    """

    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    counts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)


class _Need(NamedTuple):
    """A tensor that a row asks for. layer: Megatron path and number of the layer it is in."""

    symbols: str
    layer: tuple[str, int] | None


def find_causes(
    registry: MegatronMappingRegistry,
    structure: ModelStructure,
    tensors: Mapping[str, TensorSpec],
    terms: Terms,
    carried: Collection[str] = (),
) -> tuple[list[str], set[str]]:
    """Sentences that explain what is missing or misshapen, and the tensors that they explain.

    carried: names of further tensors that have to be there.
    """
    needs = _needs(registry, structure) | {name: _Need("", None) for name in carried}
    missing = {name: need for name, need in needs.items() if name not in tensors}
    extra = [name for name in tensors if name not in needs]
    causes: list[str] = []
    explained: set[str] = set()
    for find in (
        _adapters_alone,
        _other_names,
        _word_too_much,
        _other_word,
        _absent_parts,
        _absent_layers,
    ):
        for cause, names in find(needs, missing, extra, terms):
            causes.append(cause)
            explained |= names
            missing = {name: need for name, need in missing.items() if name not in names}
    for cause, names in _sizes(needs, structure, tensors, terms):
        causes.append(cause)
        explained |= names
    return causes, explained


def _needs(registry: MegatronMappingRegistry, structure: ModelStructure) -> dict[str, _Need]:
    needs: dict[str, _Need] = {}
    for row, ranges in registry.expand(structure):
        path, wildcard, _ = row.megatron_param.partition(WILDCARD)
        for numbers in product(*ranges[: row.hf_wildcards]):
            layer = (path, numbers[0]) if wildcard and numbers else None
            for role, name in registry.hf_names(row, numbers).items():
                needs[name] = _Need(row.hf_symbols.get(role, ""), layer)
    return needs


type _Found = Iterator[tuple[str, set[str]]]


def _adapters_alone(
    needs: Mapping[str, _Need], missing: Mapping[str, _Need], extra: list[str], terms: Terms
) -> _Found:
    if len(missing) == len(needs) and extra and all(map(_ADAPTER.search, extra)):
        yield (
            (
                f"all {len(extra)} tensors are of an adapter, such as {extra[0]}; merge it into "
                f"its base model (merge_and_unload) and save that"
            ),
            set(missing),
        )


def _other_names(
    needs: Mapping[str, _Need], missing: Mapping[str, _Need], extra: list[str], terms: Terms
) -> _Found:
    if len(missing) == len(needs) and extra:
        yield (
            (
                f"none of the {len(extra)} names is one of this model's: the files begin with "
                f"{extra[0]}, the model with {next(iter(needs))}; they are of another model, or "
                f"written by another program in names of its own"
            ),
            set(missing),
        )


def _word_too_much(
    needs: Mapping[str, _Need], missing: Mapping[str, _Need], extra: list[str], terms: Terms
) -> _Found:
    """A wrapper of a training program that left its name inside of those of the tensors."""
    if not missing:
        return
    known = {word for name in needs for word in name.split(".")}
    words = Counter(word for name in extra for word in dict.fromkeys(name.split(".")))
    for word, count in words.most_common():
        if word in known or word.isdecimal() or count < len(missing) * _MOST_OF / 2:
            continue
        without = {name.replace(f"{word}.", "", 1): name for name in extra if f"{word}." in name}
        hit = {name for name in missing if name in without or name in _unrepeated(without, word)}
        if len(hit) >= _MOST_OF * len(missing):
            example = next(iter(without.values()))
            if _ADAPTER.search(example):
                yield (
                    (
                        f"these are adapter weights that are not merged: {len(hit)} names have "
                        f"{word}., such as {example}; merge the adapter into its base model "
                        f"(merge_and_unload) and save that"
                    ),
                    set(missing),
                )
            else:
                yield (
                    (
                        f"{len(hit)} names have {word}. in their middle, such as {example}; save "
                        f"the model that is wrapped, not its wrapper"
                    ),
                    set(missing),
                )
            return
    adapters = [name for name in extra if _ADAPTER.search(name)]
    if len(adapters) >= len(missing) * _MOST_OF:
        yield (
            (
                f"these are adapter weights that are not merged, such as {adapters[0]}; merge the "
                f"adapter into its base model (merge_and_unload) and save that"
            ),
            set(missing),
        )


def _unrepeated(without: Mapping[str, str], word: str) -> set[str]:
    """The names without any occurrence of a word."""
    return {name.replace(f"{word}.", "") for name in without}


def _other_word(
    needs: Mapping[str, _Need], missing: Mapping[str, _Need], extra: list[str], terms: Terms
) -> _Found:
    """One word of many names stands where the model has another."""
    if len(missing) < _MANY:
        return
    unused = set(extra)
    example = next(iter(missing))
    words = example.split(".")
    for other in extra:
        others = other.split(".")
        if len(others) != len(words):
            continue
        unlike = [n for n, pair in enumerate(zip(words, others, strict=True)) if len({*pair}) > 1]
        if len(unlike) != 1 or words[unlike[0]].isdecimal():
            continue
        old, new = words[unlike[0]], others[unlike[0]]
        swapped = {
            name: ".".join(new if word == old else word for word in name.split("."))
            for name in missing
        }
        hit = {name for name, would_be in swapped.items() if would_be in unused}
        if len(hit) >= _MOST_OF * len(missing):
            yield (
                (
                    f"{len(hit)} names have {new} where this model has {old}, such as {other}; "
                    f"convert them to the names of transformers first"
                ),
                set(missing),
            )
            return


def _absent_parts(
    needs: Mapping[str, _Need], missing: Mapping[str, _Need], extra: list[str], terms: Terms
) -> _Found:
    parts: dict[str, set[str]] = {root: set() for root in terms.parts}
    whole: set[str] = set()  # parts of which something is there: one tensor is enough to tell
    for name in needs:
        root = _part_of(name, terms)
        if root is None or root in whole:
            continue
        if name in missing:
            parts[root].add(name)
        else:
            whole.add(root)
    for root, (part, advice) in terms.parts.items():
        of_part = parts[root]
        if of_part and root not in whole:
            yield f"the {part} is absent: {_count(of_part)} ({_shown(of_part)}); {advice}", of_part


def _part_of(name: str, terms: Terms) -> str | None:
    for root in terms.parts:
        if name.startswith(root):
            return root
    return None


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return names[0] if len(names) == 1 else f"{names[0]} and others"


def _absent_layers(
    needs: Mapping[str, _Need], missing: Mapping[str, _Need], extra: list[str], terms: Terms
) -> _Found:
    layers: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, need in needs.items():
        if need.layer is not None:
            path, number = need.layer
            layers[path][number].append(name)
    for path, names_of in layers.items():
        if path not in terms.counts:
            continue
        gone = {n: names for n, names in names_of.items() if all(one in missing for one in names)}
        if not gone:
            continue
        key, what = terms.counts[path]
        names = {name for of_layer in gone.values() for name in of_layer}
        held = len(names_of) - len(gone)
        if held and min(gone) == held:
            yield (
                (
                    f"{key} is {len(names_of)}, the files hold {held} {what} "
                    f"({fold_numbers(n for n in names_of if n not in gone)}): set it to {held}, or "
                    f"take the rest from where the files come from"
                ),
                names,
            )
        else:
            which = f"all {len(gone)} {what} are absent"
            if held:
                one = len(gone) == 1
                which = (
                    f"of {len(names_of)} {what}, number{'' if one else 's'} {fold_numbers(gone)} "
                    f"{'is' if one else 'are'} absent"
                )
            yield f"{which}: {_count(names)} ({_shown(names)})", names


def _sizes(
    needs: Mapping[str, _Need],
    structure: ModelStructure,
    tensors: Mapping[str, TensorSpec],
    terms: Terms,
) -> _Found:
    """Sizes in the config for which all tensors that depend on them agree on another one."""
    known = {symbols: structure.shape(symbols) for symbols in {n.symbols for n in needs.values()}}
    asked: dict[str, int] = {}
    said: dict[str, dict[int, None]] = defaultdict(dict)
    wrong: dict[str, list[str]] = defaultdict(list)
    fitting: set[str] = set()
    unclear: set[str] = set()
    for name, need in needs.items():
        if name not in tensors or not need.symbols:
            continue
        words, expected, found = need.symbols.split(), known[need.symbols], tensors[name].shape
        if len(found) != len(expected):
            unclear.add(name)
            continue
        for word, size, other in zip(words, expected, found, strict=True):
            match = _SIZE.fullmatch(word)
            if match is None:
                continue
            times, symbol = int(match["times"] or 1), match["symbol"]
            if size == other:
                fitting.add(symbol)
            elif other % times:
                unclear.add(name)
            else:
                asked[symbol] = size // times
                said[symbol][other // times] = None
                wrong[symbol].append(name)
    good = [symbol for symbol in said if symbol not in fitting and len(said[symbol]) == 1]
    bad = {name for symbol in said if symbol not in good for name in wrong[symbol]} | unclear
    explained = {name for symbol in good for name in wrong[symbol]} - bad
    good = [symbol for symbol in good if explained.intersection(wrong[symbol])]
    keys = [symbol for symbol in good if symbol in terms.sizes]
    if not keys:
        return
    differences = [
        f"{terms.sizes[symbol]} is {asked[symbol]}, the files have {next(iter(said[symbol]))}"
        for symbol in keys
    ]
    if len(keys) > 2:
        shown = "; ".join(differences[:3])
        yield f"config.json belongs to another model than the weights: {shown}", explained
        return
    for symbol, difference in zip(keys, differences, strict=True):
        names = [name for name in wrong[symbol] if name in explained]
        example = names[0]
        yield (
            (
                f"{difference}: set it ({_count(names)}, such as {example}: "
                f"the config asks for shape {known[needs[example].symbols]} "
                f"[{needs[example].symbols}], found {tensors[example].shape})"
            ),
            explained,
        )
