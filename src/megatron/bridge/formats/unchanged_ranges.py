"""What of an export is, byte for byte, a range of the files that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.bridge.dtypes import itemsize
from megatron.bridge.engine.block_sharing import TensorRange
from megatron.bridge.engine.pieces import FileCopy, Literal, OutputFile, Part, TensorData
from megatron.bridge.formats.torch_dist.reader import Place, TorchDistCheckpoint
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.tensors.box_pairs import axes_in_hf_order, hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, box_shape, relative, volume
from megatron.bridge.tensors.runs import run_start

_LEAST_RANGE = 16 << 10
"""Bytes below which ranges are so many that reading them together costs less."""

type Ranges = Callable[[TensorData], Sequence[TensorRange]]
"""The ranges of which a block of a tensor consists, in order; none where it does not."""


def with_ranges(file: OutputFile, ranges: Ranges) -> OutputFile:
    """The same file, its blocks of tensors as ranges of other files where they are."""
    parts: list[Part] = []
    for part in file.parts:
        found = ranges(part) if isinstance(part, TensorData) else ()
        parts += found or [part]
    return replace(file, parts=tuple(parts))


def ranges_of_export(
    plan: ConversionPlan,
    checkpoint: TorchDistCheckpoint,
    reference: Callable[[str], TensorInfo | None],
) -> Ranges:
    """The ranges of tensors that an export takes from the checkpoint, or from its reference.

    Args:
        plan: of the export, as `fill_export` follows it.
        checkpoint: the one that is exported.
        reference: where a tensor of the reference lies; it is asked for carried tensors only.
    """

    def ranges(data: TensorData) -> Sequence[TensorRange]:
        if (copy := plan.equal.get(data.name)) is not None:
            data = replace(data, name=copy.name)
        if data.name in plan.carried:
            return _in_tensor(reference(data.name), data)
        return _in_checkpoint(plan, checkpoint, data)

    return ranges


def _in_tensor(info: TensorInfo | None, data: TensorData) -> Sequence[TensorRange]:
    if info is None or info.dtype != data.dtype:
        return ()
    start = run_start(info.shape, data.box)
    if start is None or not data.nbytes:
        return ()
    offset = info.offset + start * itemsize(info.dtype)
    return [TensorRange(info.file, offset, data.nbytes, data.name, data.box, data.dtype)]


def _in_checkpoint(
    plan: ConversionPlan, checkpoint: TorchDistCheckpoint, data: TensorData
) -> Sequence[TensorRange]:
    found: list[tuple[int, TensorRange]] = []
    for part, copy in plan.copies_from(data.name, data.box):
        if copy.offset or checkpoint.dtype_of(copy.megatron_key) != data.dtype:
            return ()
        for place in checkpoint.places(copy.megatron_key, megatron_part(copy, part)):
            one = _range(copy, data, *place)
            if one is None or one[1].nbytes < _LEAST_RANGE:
                return ()
            found.append(one)
    found.sort(key=lambda one: one[0])
    ranges = [one for _, one in found]
    return ranges if sum(one.nbytes for one in ranges) == data.nbytes else ()


def _range(
    copy: Copy, data: TensorData, shared: Box, chunk: Box, place: Place
) -> tuple[int, TensorRange] | None:
    """A part of a chunk: where it begins in a block, in bytes, and where it lies.

    None where its elements do not follow each other on both sides, in the same order.
    """
    info, order = place
    width, box = itemsize(data.dtype), hf_part(copy, shared)
    within = relative(shared, chunk)
    wanted = [axis for axis in axes_in_hf_order(copy) if shared[axis][1] - shared[axis][0] > 1]
    if wanted != [axis for axis in order if shared[axis][1] - shared[axis][0] > 1]:
        return None
    here = run_start(box_shape(data.box), relative(box, data.box))
    there = run_start(info.shape, tuple(within[axis] for axis in order))
    if here is None or there is None:
        return None
    nbytes = volume(shared) * width
    offset = info.offset + there * width
    return here * width, TensorRange(info.file, offset, nbytes, data.name, box, data.dtype)


def as_copy(file: OutputFile) -> OutputFile:
    """The same file as a copy of another one, if it is that from its first byte to its last.

    Raises:
        CheckpointError: the other file cannot be read.
    """
    paths = {part.path for part in file.parts if isinstance(part, TensorRange)}
    if len(paths) != 1:
        return file
    [path] = paths
    whole = OutputFile.copy_of(file.name, path)
    if whole.nbytes != file.nbytes:
        return file
    position = 0
    for part in file.parts:
        if isinstance(part, TensorRange):
            equal = part.offset == position
        else:
            equal = isinstance(part, Literal) and _holds(path, position, part.data)
        if not equal:
            return file
        position += part.nbytes
    return whole


def _holds(path: Path, offset: int, content: bytes) -> bool:
    found = bytearray(len(content))
    FileCopy(path, offset, len(content)).write_to(memoryview(found), lambda *_: None)
    return found == content
