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
    import torch

    shape = plan.hf[one].shape
    if shape != plan.hf[other].shape:
        return False
    for box in row_blocks(shape, 1, _BLOCK_ELEMENTS):
        first, second = (read_box(source, name, box) for name in (one, other))
        wide = torch.promote_types(first.dtype, second.dtype)
        first, second = first.to(wide), second.to(wide)
        if not bool(((first == second) | (first.isnan() & second.isnan())).all()):
            return False
    return True
