"""Comparing two sources of tensors: every element is looked at, in bounded memory, to the end."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from math import inf, nan

import pytest
import torch

from megatron.bridge.engine.comparison import compare_tensors
from megatron.bridge.engine.difference import Difference, difference
from megatron.bridge.engine.stream import Budget
from megatron.bridge.progress import Silent
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import Box, tiling_faults
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.tensors.torch_views import as_array
from tensors_in_memory import InMemory

SMALL = Budget(threads=3, piece_bytes=200)


class Memory(InMemory):
    """It remembers what was asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.asked: list[tuple[str, Box]] = []

    @property
    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(name, tuple(tensor.shape), self.dtype_of(name))
            for name, tensor in self.tensors.items()
        ]

    def fill(self, name: str, box: Box, out: Array) -> None:
        assert out.flags.c_contiguous
        self.asked.append((name, box))
        self.read_into(name, box, out)


class Counted(Silent):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, task: str, total_bytes: int) -> None:
        assert task == "verify"
        self.total += total_bytes

    def advance(self, done_bytes: int) -> None:
        self.done += done_bytes


@pytest.fixture
def source() -> Memory:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Memory(
        {
            "z.long": random(3, 7, 11, 13).bfloat16(),
            "a.matrix": random(31, 17),
            "m.scalar": torch.tensor(2.5),
            "e.empty": torch.empty(0, 5),
            "b.vector": torch.arange(600, dtype=torch.uint8),
        }
    )


def test_all_is_read_once_from_both_sides(source: Memory) -> None:
    other, progress = Memory(source.tensors), Counted()
    found = compare_tensors(source.specs, source.fill, other.fill, SMALL, progress)
    assert list(found.items()) == [(name, Difference()) for name in source.tensors]
    for side in (source, other):
        for spec in side.specs:
            boxes = [box for name, box in side.asked if name == spec.name]
            assert list(tiling_faults(spec.shape, boxes)) == [] or spec.shape[0] == 0
    assert len(source.asked) > 20
    assert progress.total == progress.done == sum(spec.nbytes for spec in source.specs)


def test_differences_add_up_over_blocks(source: Memory) -> None:
    changed = {name: tensor.clone() for name, tensor in source.tensors.items()}
    changed["z.long"][1, ::3] += 2
    changed["z.long"][2, 6, 10, 12] = 64
    changed["a.matrix"][30, 16] = nan
    changed["b.vector"][599] ^= 128
    other = Memory(changed)
    found = compare_tensors(source.specs, source.fill, other.fill, SMALL, Silent())
    assert list(found) == list(source.tensors)
    for name, tensor in source.tensors.items():
        assert found[name] == difference(as_array(tensor), as_array(changed[name]))
    assert found["a.matrix"] == Difference(1, inf)
    assert found["b.vector"] == Difference(1, 128.0)
    assert found["z.long"].elements == 3 * 11 * 13 + 1


def test_blocks_begin_at_the_rows_that_a_side_can_make(source: Memory) -> None:
    rows = {"a.matrix": 8}
    compare_tensors(source.specs, source.fill, source.fill, SMALL, Silent(), rows_multiple=rows)
    boxes = {box for name, box in source.asked if name == "a.matrix"}
    assert sorted(boxes) == [((start, min(start + 8, 31)), (0, 17)) for start in range(0, 31, 8)]


def test_memory_does_not_grow_with_a_tensor() -> None:
    spec = TensorSpec("large", (64, 3, 1 << 20), "U8")

    def fill(name: str, box: Box, out: Array) -> None:
        out[...] = 0

    budget = Budget(threads=2, piece_bytes=1 << 20)
    tracemalloc.start()
    try:
        found = compare_tensors([spec], fill, fill, budget, Silent())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == {"large": Difference()}
    assert peak < 3 * 2 * (1 << 20)


def test_an_error_of_a_side_ends_all(source: Memory) -> None:
    error = OSError("gone")

    def broken(name: str, box: Box, out: Array) -> None:
        if name == "z.long" and box[0] == (1, 2):
            raise error
        source.fill(name, box, out)

    with pytest.raises(OSError, match="gone") as raised:
        compare_tensors(source.specs, broken, source.fill, SMALL, Silent())
    assert raised.value is error
    assert not any(name == "b.vector" for name, _ in source.asked)
