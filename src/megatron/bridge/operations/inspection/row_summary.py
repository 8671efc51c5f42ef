"""The rows of a plan as people read them: all parameters of a row under one folded name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Self

from megatron.bridge.models.conversion.plan import RowUse
from megatron.bridge.text.folding import fold_pattern


@dataclass(frozen=True)
class RowSummary:
    """One declared row as it is used: folded names, layout, number of Megatron parameters."""

    megatron: str
    hf: tuple[str, ...]
    layout: str
    count: int

    @classmethod
    def of(cls, row: RowUse) -> Self:
        """All parameters of a row under one folded name."""
        numbers = [tuple(map(str, one)) for one in product(*row.numbers)]
        megatron, *hf = (
            " ".join(fold_pattern(pattern, numbers))
            for pattern in (row.megatron_param, *row.hf_params)
        )
        return cls(megatron, tuple(hf), row.layout, row.count)
