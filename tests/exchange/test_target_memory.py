"""Memory that cannot be filled is refused; views that only lie between one another are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.exchange.landing import Landing, landings_of
from megatron.bridge.exchange.target_memory import check_memory

PLAN: Any = SimpleNamespace(
    equal={"head": SimpleNamespace(name="embedding")},
    hf={"embedding": SimpleNamespace(shape=(7, 3))},
)


def landing(name: str, out: Tensor, start: int = 0) -> Landing:
    return Landing(name, tuple((start, start + size) for size in out.shape), out)


def test_views_of_one_memory() -> None:
    memory = torch.zeros(6, 4, 10)
    columns = [landing(f"c{i}", memory[:, :, i : i + 2]) for i in range(0, 10, 2)]
    check_memory(PLAN, columns)
    rows = [landing(f"r{i}", memory.transpose(0, 1)[i]) for i in range(4)]
    check_memory(PLAN, rows)
    flat = memory.view(-1)
    check_memory(PLAN, [landing("even", flat[::2]), landing("odd", flat[1::2])])
    held = SimpleNamespace(key="weight", data=memory[:, :, 3:])
    check_memory(PLAN, [landing("left", memory[:, :, :3])], [held])
    check_memory(PLAN, [landing("none", memory[:0]), landing("one", memory[:1])])


MEMORY = torch.zeros(6, 4, 10)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([MEMORY[:, :, :5], MEMORY[:, :, 4:]], r"t0\[0:6, 0:4, 0:5\]: .* overlaps that of t1\["),
        (
            [MEMORY, MEMORY[5, 3, 9:]],
            r"t0\[0:6, 0:4, 0:10\]: its memory overlaps that of t1\[0:1\]",
        ),
        ([MEMORY.view(torch.int16)[..., 1:2], MEMORY[..., 0]], "overlaps"),
        ([MEMORY, MEMORY], "overlaps"),
        ([MEMORY[0].expand(3, 4, 10)], r"in one place \(shape \(3, 4, 10\), strides \(0, 10, 1\)"),
        ([MEMORY.as_strided((5, 4), (3, 1))], "several elements of its memory are in one place"),
        ([MEMORY.to("meta")], "on the meta device"),
    ],
)
def test_memory_that_cannot_be_filled(targets: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_memory(PLAN, [landing(f"t{i}", one) for i, one in enumerate(targets)])


def test_memory_of_the_model() -> None:
    held = SimpleNamespace(key="decoder.weight", data=MEMORY[:3])
    for targets in ([landing("t", MEMORY[2:])], [landing("t", MEMORY[1])]):
        with pytest.raises(InputError, match=r"^t\[.*overlaps that of the model's decoder\.weight"):
            check_memory(PLAN, targets, [held])


def test_tied_weights_are_one_memory() -> None:
    weight = torch.zeros(7, 3)
    check_memory(PLAN, [landing("head", weight), landing("embedding", weight)])
    for other in (landing("embedding", weight[1:]), landing("head", weight, 1)):
        with pytest.raises(InputError, match="overlaps"):
            check_memory(PLAN, [landing("embedding", weight), other])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"embedding": torch.zeros(6, 3)}, r"embedding: .* of shape \(6, 3\); expected \(7, 3\)"),
        ({"a": 3}, "'a': its memory is 3; expected a tensor"),
        ([("a", ((0, 2),), MEMORY)], "expected a Landing"),
        ([Landing("a", ((0, 2),), None)], "'a': its memory is None"),  # type: ignore[arg-type]
        ([Landing("a", [[0, 2]], torch.zeros(2))], r"a: its box is \[\[0, 2\]\]; expected a tuple"),  # type: ignore[arg-type,list-item]
        ([Landing("a", ((0, 2),), torch.zeros(3))], r"is of shape \(3,\); expected \(2,\)"),
    ],
)  # fmt: skip
def test_what_is_no_target(targets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        landings_of(targets, PLAN)
