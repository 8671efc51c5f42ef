"""Copies at equal distances are one, and do what the single ones do."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.bridge.exchange.strided_copies import CopyList, Elements

SIZE = 600
SHAPE = (2, 3)


def elements(memory: torch.Tensor, start: int, strides: tuple[int, ...] = (3, 1)) -> Elements:
    return Elements(memory, start, strides)


@given(st.lists(st.integers(0, SIZE - 20), max_size=30), st.permutations(range(70)))
@settings(deadline=None)
def test_they_do_what_single_copies_do(of: list[int], places: list[int]) -> None:
    """From anywhere, some at equal distances by chance, to places of their own."""
    values, expected = torch.arange(SIZE), torch.full((SIZE,), -1)
    found, copies = expected.clone(), CopyList()
    pairs = list(zip(of, places, strict=False))
    for start, place in pairs:
        to = place * 8
        expected[to : to + 6] = (
            values[start : start + 11].as_strided(SHAPE, (1, 4), start).flatten()
        )
        copies.add(elements(found, to), elements(values, start, (1, 4)), SHAPE)
    ready = copies.ready()
    ready.make()
    assert torch.equal(found, expected)
    assert len(ready) <= len(pairs)


def test_loops_over_ranks_and_replicas_are_one_copy() -> None:
    """To 5 replicas of 4 ranks the same 4 parts, from two memories."""
    buffer, held, copies = torch.zeros(SIZE), [torch.rand(40), torch.rand(40)], CopyList()
    for number, memory in enumerate(held):
        for rank in range(4):
            starts = [(replica * 4 + rank) * 30 for replica in range(5)]
            copies.add(elements(buffer, number * 10), elements(memory, rank * 7), SHAPE, starts)
    ready = copies.ready()
    assert len(ready) == 2
    ready.make()
    for number, rank, replica in product(range(2), range(4), range(5)):
        place = (replica * 4 + rank) * 30 + number * 10
        assert torch.equal(buffer[place : place + 6], held[number][rank * 7 : rank * 7 + 6])


def test_back() -> None:
    """What was received is packed again, as where only changes are sent."""
    memory, buffer, copies = torch.rand(SIZE), torch.zeros(SIZE), CopyList()
    for number in range(6):
        copies.add(elements(memory, 60 - 8 * number), elements(buffer, 9 * number), SHAPE)
    copies.ready().back()
    for number in range(6):
        place = 60 - 8 * number
        assert torch.equal(buffer[9 * number : 9 * number + 6], memory[place : place + 6])


def test_what_is_computed_is_computed_once_and_first() -> None:
    buffer, copies = torch.zeros(SIZE), CopyList()
    first = elements(buffer, 100)
    calls = []

    def compute() -> None:
        calls.append(0)
        first.view(SHAPE).fill_(7)

    copies.add(first, first, SHAPE, [50, 100, 150, 163])
    copies.compute(compute)
    copies.ready().make()
    assert (calls, int(buffer.count_nonzero())) == ([0], 5 * 6)
