"""The condition of a plan that only data can prove: tensors that have to be equal."""

from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import row_blocks
from megatron.bridge.tensors.source import Source, read_box

_BLOCK_ELEMENTS = 4 << 20


def check_equal(plan: ConversionPlan, source: Source) -> None:
    """Compare every tensor of `plan.equal` with the one that it has to equal.

    Values count, not dtypes. Memory is some tens of MiB.

    Args:
        plan: of a whole model.
        source: of Hugging Face tensors.

    Raises:
        PlanError: two of them differ.
    """
    problems = [
        f"{name} and {other.name} differ, but {other.otherwise}"
        for name, other in plan.equal.items()
        if not _equal(plan, source, name, other.name)
    ]
    if problems:
        raise PlanError(problems)


def _equal(plan: ConversionPlan, source: Source, one: str, other: str) -> bool:
    import numpy as np

    from megatron.bridge.tensors.arrays import same_bits

    shape = plan.hf[one].shape
    if shape != plan.hf[other].shape:
        return False
    for box in row_blocks(shape, 1, _BLOCK_ELEMENTS):
        first, second = (read_box(source, name, box) for name in (one, other))
        if first.dtype == second.dtype and same_bits(first, second):
            continue
        wide, too = (part.astype(np.float64) for part in (first, second))
        if not np.array_equal(wide, too, equal_nan=True):
            return False
    return True
