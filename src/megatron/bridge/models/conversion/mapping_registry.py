"""The rows of one model family, and look-ups by either name."""

import itertools
from collections.abc import Iterator

from megatron.bridge.models.conversion.param_mapping import (
    WILDCARD,
    ParamMapping,
    pattern_regex,
)
from megatron.bridge.models.conversion.structure import ModelStructure

_SEPARATE_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
"""Names of norms in layer specs that do not fuse them, and the fused names that rows declare."""


class MegatronMappingRegistry:
    """All rows of a model family. Raises ValueError if two rows claim the same name."""

    def __init__(self, *mappings: ParamMapping) -> None:
        self._mappings = mappings
        self._by_megatron = [(pattern_regex(row.megatron_param), row) for row in mappings]
        self._by_hf = [
            (pattern_regex(name), row) for row in mappings for name in row.hf_params.values()
        ]
        for kind, names in (
            ("Megatron parameter", [row.megatron_param for row in mappings]),
            ("Hugging Face name", [name for row in mappings for name in row.hf_params.values()]),
        ):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{kind} mapped by more than one row: {sorted(twice)}")

    def __len__(self) -> int:
        return len(self._mappings)

    def get_all_mappings(self) -> list[ParamMapping]:
        """Every row as declared, wildcards and all."""
        return list(self._mappings)

    def megatron_to_hf_lookup(self, megatron_param: str) -> ParamMapping | None:
        """The row of a parameter, its wildcards replaced, or None.

        Names of layer specs with separate norms (``input_layernorm.weight``) are understood too.
        """
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

    def hf_to_megatron_lookup(self, hf_param: str) -> ParamMapping | None:
        """The row that a Hugging Face tensor takes part in, its wildcards replaced, or None."""
        for regex, row in self._by_hf:
            if match := regex.fullmatch(hf_param):
                return row.resolve(match.groups())
        return None

    def expand(self, structure: ModelStructure) -> Iterator[tuple[ParamMapping, ParamMapping]]:
        """(row as declared, row of one parameter) for every parameter of a model.

        Raises KeyError if a wildcard's numbers are not in `structure`.
        """
        for row in self._mappings:
            if row.only is not None and row.only not in structure.features:
                continue
            for numbers in _numbers(row.megatron_param, structure):
                yield row, row.resolve(numbers)


def _numbers(pattern: str, structure: ModelStructure) -> Iterator[tuple[str, ...]]:
    """What the wildcards of `pattern` stand for in a model, in order."""
    parts = pattern.split(WILDCARD)
    ranges = [structure.indices[WILDCARD.join(parts[: axis + 1])] for axis in range(len(parts) - 1)]
    for numbers in itertools.product(*ranges):
        yield tuple(str(number) for number in numbers)
