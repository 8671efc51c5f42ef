"""The rows of a plan as people read them: all parameters of a row under one folded name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from megatron.bridge.models.conversion.plan import ConversionPlan, RowUse
from megatron.bridge.text.folding import fold_pattern


@dataclass(frozen=True)
class RowSummary:
    """One declared row as it is used: folded names, layout, number of Megatron parameters."""

    megatron: str
    hf: tuple[str, ...]
    layout: str
    count: int


def row_summaries(plan: ConversionPlan) -> list[RowSummary]:
    """The rows of a plan, in their order."""
    return [_summary(row) for row in plan.rows]


def _summary(row: RowUse) -> RowSummary:
    numbers = [tuple(map(str, one)) for one in product(*row.numbers)]
    megatron, *hf = (
        " ".join(fold_pattern(pattern, numbers)) for pattern in (row.megatron_param, *row.hf_params)
    )
    return RowSummary(megatron, tuple(hf), row.layout, row.count)
