"""Tensors from two sides compared block by block, in several threads and in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from megatron.bridge.engine.difference import Difference, difference
from megatron.bridge.engine.pieces import FillTensor, TensorData, tensor_blocks
from megatron.bridge.engine.stream import Budget
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.progress import Progress
from megatron.bridge.tensors.arrays import Array, array_over
from megatron.bridge.tensors.boxes import box_shape
from megatron.bridge.tensors.spec import TensorSpec


def compare_tensors(
    specs: Iterable[TensorSpec],
    a: FillTensor,
    b: FillTensor,
    budget: Budget,
    progress: Progress,
    *,
    rows_multiple: Mapping[str, int] | None = None,
) -> dict[str, Difference]:
    """Compare tensors that both sides have with these shapes and dtypes.

    Each thread has a buffer of the length of a block for either side.

    Args:
        specs: the tensors.
        a: one side: fills a box of a tensor into contiguous memory; called by several threads.
        b: the other side, likewise.
        budget: how many threads, and how long their blocks are.
        progress: told of a task "verify", in bytes of the tensors.
        rows_multiple: tensors that are only made from such a multiple of rows on, by name (see
            `row_blocks`).

    Returns:
        The difference of every tensor, by name and in the order of `specs`.

    Raises:
        BaseException: whatever a side raises; all threads have ended then.
    """
    specs = list(specs)
    found = {spec.name: Difference() for spec in specs}
    lock = threading.Lock()
    progress.start("verify", sum(spec.nbytes for spec in specs))

    def work(blocks: Iterator[TensorData]) -> None:
        here, there = _Buffer(), _Buffer()
        for block in blocks:
            apart = difference(here.filled(block, a), there.filled(block, b))
            with lock:
                found[block.name] += apart
                progress.advance(block.nbytes)

    blocks = tensor_blocks(specs, budget.piece_bytes, rows_multiple or {})
    run_in_threads(blocks, work, budget.threads)
    return found


class _Buffer:
    """Memory that grows to the longest block it was filled with."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def filled(self, block: TensorData, fill: FillTensor) -> Array:
        """The block as one side has it; until it is filled again."""
        if block.nbytes > len(self._memory):
            self._memory = memoryview(b"")  # the old one goes first
            self._memory = memoryview(bytearray(block.nbytes))
        array = array_over(self._memory[: block.nbytes], box_shape(block.box), block.dtype)
        fill(block.name, block.box, array)
        return array
