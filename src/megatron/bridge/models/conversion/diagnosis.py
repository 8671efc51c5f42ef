"""The cause of tensors that are missing or of another shape: the one that a person can act on.

A stale number in config.json, a part that was left out or a prefix of all names make hundreds of
tensors wrong. What is said is the cause; tensors are named where there is none that explains them.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.foreign_names import other_names
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.patterns import WILDCARD
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.folding import fold_numbers
from megatron.bridge.text.quoting import printable, quoted

_SIZE = re.compile(r"(?P<times>\d*)(?P<symbol>[A-Za-z]+)")


@dataclass(frozen=True)
class Terms:
    """The words of a family, for messages.

    Attributes:
        parts: root of Hugging Face names -> (what that part is called, what to do without it),
            longer roots first.
        counts: Megatron path before a wildcard -> (key of the config, what it counts).
        sizes: symbol of a shape -> key of the config.
    """

    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    counts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)


class _Need(NamedTuple):
    """A tensor that a row asks for; `layer` is the Megatron path and the number of its layer."""

    symbols: str
    layer: tuple[str, int] | None


def find_causes(
    registry: MegatronMappingRegistry,
    structure: ModelStructure,
    tensors: Mapping[str, TensorSpec],
    terms: Terms,
    carried: Collection[str],
) -> tuple[list[str], set[str]]:
    """Why tensors are missing or misshapen.

    Args:
        registry: the rows of the model.
        structure: of the model.
        tensors: those that are there, by name.
        terms: the family's words.
        carried: names of further tensors that have to be there.

    Returns:
        Sentences, and the names of the tensors that they explain.
    """
    needs = _needs(registry, structure) | {name: _Need("", None) for name in carried}
    missing = [name for name in needs if name not in tensors]
    extra = [name for name in tensors if name not in needs]
    causes: list[str] = []
    explained: set[str] = set()
    if cause := other_names(needs, missing, extra):
        causes.append(cause)
        explained.update(missing)
    for find in (_absent_parts, _absent_layers):
        for cause, names in find(needs, set(missing) - explained, terms):
            causes.append(cause)
            explained |= names
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


def _absent_parts(needs: Mapping[str, _Need], missing: set[str], terms: Terms) -> _Found:
    parts: dict[str, set[str]] = {root: set() for root in terms.parts}
    whole: set[str] = set()  # parts of which something is there: one tensor is enough to tell
    for name in needs:
        root = next((root for root in terms.parts if name.startswith(root)), None)
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


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return names[0] if len(names) == 1 else f"{names[0]} and others"


def _absent_layers(needs: Mapping[str, _Need], missing: set[str], terms: Terms) -> _Found:
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
            there = fold_numbers(n for n in names_of if n not in gone)
            cause = (
                f"{key} is {len(names_of)}, the files hold {held} {what} ({there}): set it to "
                f"{held}, or take the rest from where the files come from"
            )
        else:
            which = f"all {len(gone)} {what} are absent"
            if held:
                one = len(gone) == 1
                which = (
                    f"of {len(names_of)} {what}, number{'' if one else 's'} {fold_numbers(gone)} "
                    f"{'is' if one else 'are'} absent"
                )
            cause = f"{which}: {_count(names)} ({_shown(names)})"
        yield cause, names


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
        symbols = needs[example].symbols
        cause = (
            f"{difference}: set it ({_count(names)}, such as {example}: the config asks for shape "
            f"{known[symbols]} [{symbols}], found {tensors[example].shape})"
        )
        yield cause, explained


def found_beside(error: PlanError, beside: Mapping[str, str]) -> str:
    """What to say where tensors are missing that lie in a file beside the model's; or nothing."""
    named = (problem.partition(": missing, ")[0] for problem in error.problems)
    found = {name: beside[name] for name in named if name in beside}
    if not found:
        return ""
    files, name = sorted(set(found.values())), next(iter(found))
    shown = ", ".join(map(printable, files[:3])) + ", ..." * (len(files) > 3)
    return (
        f"{len(found)} tensor{'s are' if len(found) > 1 else ' is'} missing, such as {name}, and "
        f"in a file that does not count as the model's: {shown}. Take the weight index that "
        f"belongs to these files, or name {'them' if len(files) > 1 else 'it'} in the one that is "
        f"there"
    )


def assumed_sizes(origin: str, filled_in: Mapping[str, Any], problems: str) -> str:
    """What to say where files contradict sizes that the config leaves out; empty for none.

    Args:
        origin: of the config.
        filled_in: see HFConfig.
        problems: text; sizes that it names are shown alone.
    """
    sizes = {path: value for path, value in filled_in.items() if type(value) in (int, list)}
    if not sizes:
        return ""
    sizes = {path: value for path, value in sizes.items() if path in problems} or sizes
    shown = ", ".join(f"{path} ({quoted(value)})" for path, value in sizes.items())
    return (
        f"{origin} does not state {shown}: these are transformers' defaults, and do not fit the "
        f"files; state what they have"
    )
