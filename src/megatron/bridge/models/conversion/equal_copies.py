"""The condition of a plan that only data can prove: tensors that have to be equal."""

from math import prod

from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.source import Source

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

    from megatron.bridge.dtypes import torch_dtype

    shape = plan.hf[one].shape
    if shape != plan.hf[other].shape:
        return False
    rows, width = shape[0], prod(shape[1:])
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        box: Box = ((start, stop), *((0, size) for size in shape[1:]))
        parts = []
        for name in (one, other):
            part = torch.empty(
                (stop - start, *shape[1:]), dtype=torch_dtype(source.dtype_of(name)), device="cpu"
            )
            source.read_into(name, box, part)
            parts.append(part)
        wide = torch.promote_types(parts[0].dtype, parts[1].dtype)
        first, second = (part.to(wide) for part in parts)
        if not bool(((first == second) | (first.isnan() & second.isnan())).all()):
            return False
    return True
