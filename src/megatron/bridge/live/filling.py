"""Filling the parameters of this rank from Hugging Face tensors, in the order of the files.

Several threads read at once, each straight into the parameters' memory. Only what is on another
device, or in another dtype than the plan says, goes through a buffer of a piece.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron.bridge.dtypes import itemsize, numpy_dtype
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.live.fresh_memory import make_pages
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import fill_megatron
from megatron.bridge.progress import Progress
from megatron.bridge.tensors.arrays import empty
from megatron.bridge.tensors.box_pairs import hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, blocks_of, box_shape, relative, slices, volume
from megatron.bridge.tensors.source import Source
from megatron.bridge.tensors.torch_views import as_array, as_torch, numpy_dtype_of

PIECE_BYTES = 8 << 20
"""Of a file, read at once."""

_MOST_THREADS = 8


def reading_threads() -> int:
    """How many reads are in flight: two for each processor, as one of them waits for the disk."""
    return min(_MOST_THREADS, 2 * len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class _Target:
    """A tensor of this rank.

    Attributes:
        local: the tensor.
        dtype: that the plan gives its key.
        is_shifted: whether its values are not those of the files, and may not survive a cast.
    """

    local: LocalTensor
    dtype: str
    is_shifted: bool

    @cached_property
    def data(self) -> torch.Tensor:
        """The memory, in the shape of the box."""
        return self.local.data.detach().view(box_shape(self.local.box))

    @cached_property
    def is_direct(self) -> bool:
        """Whether files can be read straight to its memory."""
        on_cpu = self.data.device.type == "cpu"
        return on_cpu and numpy_dtype_of(self.data) == numpy_dtype(self.dtype)


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor of this rank that is filled at once."""

    target: _Target
    box: Box

    def fill(self, plan: ConversionPlan, source: Source, casting: Casting) -> None:
        """Read it, or make it zero where it is padding."""
        target, local = self.target, self.target.local
        part = target.data[slices(relative(self.box, local.box))]
        if target.is_direct:
            make_pages(part)
            fill_megatron(plan, local.key, self.box, as_array(part), source)
            return
        array = empty(box_shape(self.box), target.dtype)
        fill_megatron(plan, local.key, self.box, array, source)
        if target.is_shifted:
            array = casting.cast(array, numpy_dtype_of(part), local.key)
        part.copy_(as_torch(array))


def fill_all(
    plan: ConversionPlan,
    tensors: Sequence[LocalTensor],
    source: Source,
    casting: Casting,
    progress: Progress,
    threads: int | None = None,
) -> None:
    """Fill tensors of this rank.

    Args:
        plan: of the model and the files.
        tensors: the tensors, all of which the plan fills.
        source: of Hugging Face tensors.
        casting: of values that were shifted and do not fit the dtype of a parameter.
        progress: told of the bytes of parameters that are filled.
        threads: how many read at once; None chooses.

    Raises:
        InexactCast: see `casting`.
        CheckpointError: a file cannot be read.
    """
    lock = threading.Lock()

    def work(pieces: Iterator[_Piece]) -> None:
        with torch.no_grad():  # which each thread has to say
            for piece in pieces:
                piece.fill(plan, source, casting)
                with lock:
                    progress.advance(volume(piece.box) * piece.target.data.element_size())

    pieces = list(_in_file_order(plan, tensors, source))
    run_in_threads(pieces, work, min(threads or reading_threads(), max(1, len(pieces))))


def _in_file_order(
    plan: ConversionPlan, tensors: Sequence[LocalTensor], source: Source
) -> Iterable[_Piece]:
    shifted = {copy.megatron_key for copy in plan.copies if copy.offset}
    place = {name: number for number, name in enumerate(plan.hf)}
    found: list[tuple[tuple[int, ...], _Piece]] = []
    for local in tensors:
        target = _Target(local, plan.megatron[local.key].dtype, local.key in shifted)
        for box in plan.padding_in(local.key, local.box):
            found.append(((-1,), _Piece(target, box)))
        for shared, pair in plan.copies_to(local.key, local.box):
            hf_box = hf_part(pair, shared)
            width = itemsize(source.dtype_of(pair.hf_name))
            for block in blocks_of(hf_box, width, PIECE_BYTES):
                order = (place[pair.hf_name], *(start for start, _ in block))
                found.append((order, _Piece(target, megatron_part(pair, block))))
    found.sort(key=lambda one: one[0])
    return [piece for _, piece in found]
