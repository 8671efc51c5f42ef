"""Values between the tensors that a rank holds and Hugging Face tensors, box by box."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.engine.pieces import PIECE_BYTES, FillTensor
from megatron.bridge.engine.stream import Budget
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import fill_hf, fill_megatron, read_megatron
from megatron.bridge.tensors.arrays import Array, copy
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, box_shape, relative, row_blocks, slices
from megatron.bridge.tensors.source import Source
from megatron.bridge.tensors.torch_views import as_array, as_torch, numpy_dtype_of


def fill_tensors(
    plan: ConversionPlan, tensors: Sequence[LocalTensor], source: Source, casting: Casting
) -> None:
    """Fill what a rank holds, straight into its memory where that is possible.

    Several threads read, in about the order of the files. Memory is some pieces for each of them.

    Args:
        plan: of the model and the files.
        tensors: what is filled.
        source: of Hugging Face tensors.
        casting: of a norm's w - 1; every other value is cast to the dtype of its tensor.

    Raises:
        InexactCast: see `casting`.
    """
    places = {name: place for place, name in enumerate(plan.hf)}

    def place(local: LocalTensor) -> int:
        copies = plan.copies_to(local.key, local.box)
        return min((places[pair.hf_name] for _, pair in copies), default=0)

    def blocks() -> Iterator[tuple[LocalTensor, Box]]:
        for local in sorted(tensors, key=place):
            for block in blocks_of(local.box, local.data.element_size()):
                yield local, block

    def work(own: Iterator[tuple[LocalTensor, Box]]) -> None:
        torch.set_num_threads(1)  # of this thread
        for local, block in own:
            _fill(plan, local, block, source, casting)

    run_in_threads(blocks(), work, Budget.of().threads)


def _fill(
    plan: ConversionPlan, local: LocalTensor, box: Box, source: Source, casting: Casting
) -> None:
    whole = local.data.view(box_shape(local.box))
    data = whole[slices(relative(box, local.box))]
    if data.device.type == "cpu" and data.dtype == torch_dtype(plan.megatron[local.key].dtype):
        fill_megatron(plan, local.key, box, as_array(data), source)
        return
    array = read_megatron(plan, local.key, box, source)
    if any(pair.offset for _, pair in plan.copies_to(local.key, box)):
        array = casting.cast(array, numpy_dtype_of(data), local.key)
    data.copy_(as_torch(array))


def blocks_of(box: Box, element_bytes: int) -> Iterator[Box]:
    """Parts of a box that are made at once."""
    for block in row_blocks(box_shape(box), element_bytes, PIECE_BYTES):
        yield tuple(
            (zero + start, zero + stop) for (start, stop), (zero, _) in zip(block, box, strict=True)
        )


def own_boxes(
    plan: ConversionPlan, tensors: Iterable[LocalTensor], casting: Casting
) -> Iterator[tuple[str, Box, FillTensor]]:
    """Every box of a Hugging Face tensor that what a rank holds makes, and what makes it.

    Args:
        plan: of the model and the files.
        tensors: those that the rank holds.
        casting: of values that the dtypes in the files do not hold.

    Yields:
        Name, box, and a function that makes any part of the box.
    """
    equal = defaultdict(list)
    for name, other in plan.equal.items():
        equal[other.name].append(name)
    for local in tensors:
        fill = _filler(plan, _LocalSource(local), casting)
        for shared, pair in plan.copies_to(local.key, local.box):
            for name in (pair.hf_name, *equal[pair.hf_name]):
                yield name, hf_part(pair, shared), fill


def _filler(plan: ConversionPlan, source: Source, casting: Casting) -> FillTensor:
    def fill(name: str, box: Box, out: Array) -> None:
        copy_of = plan.equal.get(name)
        fill_hf(plan, name if copy_of is None else copy_of.name, box, out, source, casting)

    return fill


class _LocalSource:
    """What a rank holds of one tensor: a Source of the boxes within."""

    def __init__(self, local: LocalTensor) -> None:
        self._local, self._data = local, local.data.view(box_shape(local.box))

    def dtype_of(self, name: str) -> str:
        """That of the memory."""
        return safetensors_dtype(self._data.dtype)

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Copy a part of the box that the rank holds."""
        copy(as_array(self._data[slices(relative(box, self._local.box))].cpu()), out)
