"""What of a Megatron checkpoint are bytes of the Hugging Face files, one after the other.

There a checkpoint can have the data as the files have them: nothing is computed and, where blocks
are shared, nothing is moved. A transposed box counts, too: its elements lie in the file in an order
of which strides can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy, Parameter
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.tensors.boxes import Box, box_shape, volume
from megatron.bridge.tensors.runs import run_start

_WORTH_A_CHUNK = 64 << 10
"""Bytes of data for which a piece of a parameter becomes a chunk of the checkpoint."""


class DataRange(NamedTuple):
    """Where all elements of a box lie in a file, one after the other.

    Attributes:
        path: of the file.
        offset: where they begin, in bytes.
        transposed: whether their order is that of the box with its last two axes swapped, and not
            that of the box.
    """

    path: Path
    offset: int
    transposed: bool


class Chunk(NamedTuple):
    """A box of a Megatron tensor; `data` is None if its elements have to be put together."""

    key: str
    box: Box
    data: DataRange | None = None


def chunks_of(
    plan: ConversionPlan, place: Callable[[str], TensorInfo | None], *, strides: bool = True
) -> Iterator[Chunk]:
    """The boxes of which a checkpoint consists, parameter by parameter.

    A parameter is one box, unless most of it are ranges of the files that are worth a box each. It
    follows from the headers of the files alone.

    Args:
        plan: of the model.
        place: where a Hugging Face tensor lies with the bytes that are read; None if they are
            computed.
        strides: whether transposed boxes count.
    """
    for parameter in plan.parameters:
        yield from _ranges(plan, parameter, place, strides=strides) or [
            Chunk(parameter.key, parameter.box)
        ]


def _ranges(
    plan: ConversionPlan,
    parameter: Parameter,
    place: Callable[[str], TensorInfo | None],
    *,
    strides: bool,
) -> list[Chunk]:
    """The boxes of a parameter; none where it is better one."""
    key, dtype = parameter.key, plan.megatron[parameter.key].dtype
    chunks, found = [], 0
    for box in plan.padding_in(key, parameter.box):
        chunks.append(Chunk(key, box))
    for box, copy in plan.copies_to(key, parameter.box):
        data = None
        nbytes = volume(box) * itemsize(dtype)
        if box == copy.megatron_box and not copy.offset and nbytes >= _WORTH_A_CHUNK:
            info = place(copy.hf_name)
            if info is not None and info.dtype == dtype and (strides or not copy.transpose):
                data = _range(info, copy)
        chunks.append(Chunk(key, box, data))
        found += nbytes if data else 0
    # In the order of the tensor, whichever that of the plan is.
    return sorted(chunks) if found >= _WORTH_A_CHUNK * len(chunks) else []


def _range(info: TensorInfo, copy: Copy) -> DataRange | None:
    """Where the elements of a copy lie; None if others lie between them."""
    shape, box = box_shape(copy.megatron_box), box_shape(copy.hf_box)
    if copy.transpose and shape[-2:] != (box[-1], box[-2]):
        return None
    start = run_start(info.shape, copy.hf_box)
    if start is None:
        return None
    return DataRange(info.file, info.offset + start * itemsize(info.dtype), copy.transpose)
