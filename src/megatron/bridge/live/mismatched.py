"""Parameters that a client replaced by others, which no file fills."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from megatron.bridge.live.local_tensors import LocalTensor, named_parameters
from megatron.bridge.models.conversion.plan import ConversionPlan


def replaced_keys(
    plan: ConversionPlan,
    model: Sequence[torch.nn.Module],
    tensors: Sequence[LocalTensor],
    allowed: Collection[str],
) -> frozenset[str]:
    """The keys of what this rank has in the place of a parameter of the plan, or beside them all.

    Args:
        plan: of the model that the files hold.
        model: the chunks of this rank.
        tensors: all that they hold.
        allowed: names of parameters, their ends behind a dot, or patterns with ``*``. One that is
            as the plan says is no other.
    """
    listed = [
        parameter
        for name, _, parameter in named_parameters(model)
        if any(_matches(name, pattern) for pattern in allowed)
    ]

    def is_replaced(local: LocalTensor) -> bool:
        spec = plan.megatron.get(local.key)
        if spec is not None and spec.shape == local.key_shape:
            return False
        return any(_is_part_of(local.data, parameter) for parameter in listed)

    return frozenset(local.key for local in tensors if is_replaced(local))


def without_keys(
    plan: ConversionPlan, tensors: Sequence[LocalTensor], keys: Collection[str]
) -> tuple[ConversionPlan, list[LocalTensor]]:
    """A plan and what this rank holds, but for these keys."""
    kept = {key: spec for key, spec in plan.megatron.items() if key not in keys}
    return replace(plan, megatron=kept), [local for local in tensors if local.key not in keys]


def _is_part_of(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a tensor is a view of (a part of) the memory of another one."""
    if part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return False
    start = int(part.storage_offset() - whole.storage_offset())
    return 0 <= start < whole.numel()


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
