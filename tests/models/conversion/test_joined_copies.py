"""Copies that continue one another: as one they move the same elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest

import plans_of
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy, joined_copies
from megatron.bridge.tensors.boxes import box_shape, slices


def numbered(plan: ConversionPlan, copies: Iterable[Copy]) -> dict[str, Any]:
    """The Megatron side that copies make of numbered elements of the Hugging Face side."""
    first, found = 1, {key: np.zeros(spec.shape, int) for key, spec in plan.megatron.items()}
    hf = {}
    for name, spec in plan.hf.items():
        hf[name] = np.arange(first, first + prod(spec.shape)).reshape(spec.shape)
        first += prod(spec.shape)
    for copy in copies:
        part = hf[copy.hf_name][slices(copy.hf_box)]
        part = part.swapaxes(-1, -2) if copy.transpose else part
        shape = box_shape(copy.megatron_box)
        found[copy.megatron_key][slices(copy.megatron_box)] = part.reshape(shape)
    return found


@pytest.mark.parametrize("family", plans_of.FAMILIES)
def test_joined_copies_are_those_that_they_stand_for(family: str) -> None:
    config = plans_of.FAMILIES[family]
    plan = plans_of.plan(config, plans_of.tensors_of(config))
    joined = list(joined_copies(plan.copies))
    assert list(replace(plan, copies=tuple(joined)).faults()) == []
    expected, found = numbered(plan, plan.copies), numbered(plan, joined)
    assert all(np.array_equal(found[key], one) for key, one in expected.items())
    experts = [copy for copy in joined if len(copy.hf_box) == 3 and ".experts." in copy.hf_name]
    assert len({(copy.hf_name, copy.megatron_key) for copy in experts}) == len(experts)
    assert bool(experts) == ("moe" in family) == (len(joined) < len(plan.copies))
    assert all(copy.hf_box[0] == (0, 3) for copy in experts)


def test_copies_that_go_on_in_unlike_orders_are_not_joined() -> None:
    rows = [Copy("a", ((n, n + 1), (0, 3)), "k", ((0, 3), (n, n + 1))) for n in range(2)]
    apart = [Copy("a", ((n, n + 1), (0, 3)), "k", ((2 * n, 2 * n + 1), (0, 3))) for n in range(2)]
    turning = [
        Copy("a", ((n, n + 1), (0, 3)), "k", (*corner, (0, 3)))
        for n, corner in enumerate([((0, 1), (0, 1)), ((0, 1), (1, 2)), ((1, 2), (1, 2))])
    ]
    for copies in (rows, apart):
        assert list(joined_copies(copies)) == copies
    assert len(list(joined_copies(turning))) == 2
