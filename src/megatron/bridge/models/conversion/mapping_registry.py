"""The rows of one model family, and look-ups by either name."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.patterns import WILDCARD, fill, pattern_regex
from megatron.bridge.models.conversion.structure import ModelStructure

_SEPARATE_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
"""Names of norms in layer specs that do not fuse them, and the fused names that rows declare."""

type Ranges = tuple[tuple[int, ...], ...]

_SEQUENTIAL_EXPERT = re.compile(r"local_experts\.(?P<expert>\d+)\.(?P<linear>\w+\.weight)$")
"""One expert as a module of its own; rows declare grouped experts, ``linear_fc1.weight7``."""


class MegatronMappingRegistry:
    """All rows of a model family.

    Args:
        *mappings: the rows.
        spelled: Hugging Face names of rows, numbers filled in -> as they are in the files.

    Raises:
        ValueError: two rows claim the same name.
    """

    def __init__(self, *mappings: ParamMapping, spelled: Mapping[str, str] | None = None) -> None:
        self._mappings = mappings
        self._spelled = spelled or {}
        names = Counter(row.megatron_param for row in mappings)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise ValueError(f"Megatron parameter mapped by more than one row: {twice}")
        # One expert of a fused tensor is a part of it; kinds of layers share names, not numbers.
        whole = Counter(
            (name, row.layers)
            for row in mappings
            for name in row.hf_params.values()
            if name.count(WILDCARD) == row.megatron_param.count(WILDCARD)
        )
        if doubled := sorted({name for (name, _), count in whole.items() if count > 1}):
            raise ValueError(f"Hugging Face name mapped by more than one row: {doubled}")

    @cached_property
    def _by_megatron(self) -> list[tuple[re.Pattern[str], ParamMapping]]:
        return [(pattern_regex(row.megatron_param), row) for row in self._mappings]

    @cached_property
    def _by_hf(self) -> list[tuple[re.Pattern[str], ParamMapping]]:
        return [
            (pattern_regex(name), row) for row in self._mappings for name in row.hf_params.values()
        ]

    def hf_names(self, row: ParamMapping, numbers: tuple[int, ...]) -> dict[str, str]:
        """The names of a row's tensors in the files, by role, with these numbers in them."""
        names = {role: fill(pattern, numbers) for role, pattern in row.hf_params.items()}
        return {role: self._spelled.get(name, name) for role, name in names.items()}

    def __len__(self) -> int:
        return len(self._mappings)

    def get_all_mappings(self) -> list[ParamMapping]:
        """Every row as declared, wildcards and all."""
        return list(self._mappings)

    def megatron_to_hf_lookup(self, megatron_param: str) -> ParamMapping | None:
        """The row of a parameter, its wildcards replaced, or None.

        Names of layer specs with separate norms (``input_layernorm.weight``) and with experts one
        by one (``local_experts.7.linear_fc1.weight``) are understood too.
        """
        megatron_param = _SEQUENTIAL_EXPERT.sub(r"\g<linear>\g<expert>", megatron_param)
        candidates = [megatron_param]
        candidates += [
            megatron_param.replace(separate, fused)
            for separate, fused in _SEPARATE_NORMS
            if separate in megatron_param
        ]
        for name in candidates:
            for regex, row in self._by_megatron:
                if match := regex.fullmatch(name):
                    return row.resolve(match.groups())
        return None

    def hf_to_megatron_lookup(
        self, hf_param: str, structure: ModelStructure | None = None
    ) -> ParamMapping | None:
        """The row that a Hugging Face tensor takes part in, its wildcards replaced, or None.

        A tensor that holds all experts is found by the row of its first expert.

        Args:
            hf_param: name of the tensor.
            structure: says which layer is of which kind: a norm belongs to different parameters in
                layers of different kinds.

        Raises:
            InputError: more than one row fits, and no structure is given.
        """
        found = []
        for regex, row in self._by_hf:
            if match := regex.fullmatch(hf_param):
                numbers = match.groups()
                if structure is not None and not _exists(row, numbers, structure):
                    continue
                missing = row.megatron_param.count(WILDCARD) - len(numbers)
                found.append(row.resolve((*numbers, *("0",) * missing)))
        if len(found) > 1:
            rows = " or ".join(row.megatron_param for row in found)
            raise InputError(
                f"{hf_param} belongs to {rows}, by the kind of the layer; pass the structure"
            )
        return found[0] if found else None

    def expand(self, structure: ModelStructure) -> Iterator[tuple[ParamMapping, Ranges]]:
        """Every row of a model, with what each of its wildcards stands for.

        Each combination of numbers is a parameter.

        Raises:
            KeyError: a wildcard's numbers are not in `structure`.
        """
        for row in self._mappings:
            if row.only is None or row.only in structure.features:
                ranges = _ranges(row, structure)
                if all(ranges):
                    yield row, ranges


def _exists(row: ParamMapping, numbers: tuple[str, ...], structure: ModelStructure) -> bool:
    """Whether a model has this row at all, and for a layer of this number."""
    if row.only is not None and row.only not in structure.features:
        return False
    path, wildcard, _ = row.megatron_param.partition(WILDCARD)
    return not wildcard or int(numbers[0]) in structure.numbers(path, row.layers)


def _ranges(row: ParamMapping, structure: ModelStructure) -> Ranges:
    """What the wildcards of a row stand for in a model, in order; the first is the layer."""
    parts = row.megatron_param.split(WILDCARD)
    paths = [WILDCARD.join(parts[: axis + 1]) for axis in range(len(parts) - 1)]
    return tuple(
        structure.numbers(path, row.layers if axis == 0 else None)
        for axis, path in enumerate(paths)
    )
