"""Moving elements along boxes: the only place where a plan or a layout touches tensors.

Everything is built on two functions of a pair of boxes, whichever side is read: where a part of
one box lies on the other side, and how the elements are arranged there.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.models.conversion.boxes import (
    Box,
    box_shape,
    relative,
    slices,
)
from megatron.bridge.models.conversion.layout import Layout
from megatron.bridge.models.conversion.plan import ConversionPlan

type Read = Callable[[str, Box], torch.Tensor]
"""Reads one box of a named tensor: ``read(name, box)`` of shape ``box_shape(box)``."""


class BoxPair(Protocol):
    """A box on either side that hold the same elements (a Piece or a Copy)."""

    @property
    def hf_box(self) -> Box: ...
    @property
    def megatron_box(self) -> Box: ...
    @property
    def transpose(self) -> bool: ...
    @property
    def offset(self) -> float: ...


def hf_part(pair: BoxPair, megatron_part: Box) -> Box:
    """The part of the Hugging Face box that fills `megatron_part`, a part of the Megatron box."""
    return _carry_over(pair.megatron_box, pair.hf_box, megatron_part, *_axes(pair))


def megatron_part(pair: BoxPair, hf_part: Box) -> Box:
    """The part of the Megatron box that `hf_part`, a part of the Hugging Face box, fills."""
    megatron_axes, hf_axes = _axes(pair)
    return _carry_over(pair.hf_box, pair.megatron_box, hf_part, hf_axes, megatron_axes)


def _axes(pair: BoxPair) -> tuple[list[int], list[int]]:
    """The axes of extent above 1 on either side, in the order in which they correspond."""
    hf_axes = list(range(len(pair.hf_box)))
    if pair.transpose:
        hf_axes[-2:] = hf_axes[-1], hf_axes[-2]
    return (
        [axis for axis, (start, stop) in enumerate(pair.megatron_box) if stop - start > 1],
        [axis for axis in hf_axes if pair.hf_box[axis][1] - pair.hf_box[axis][0] > 1],
    )


def _carry_over(
    source: Box, target: Box, part: Box, source_axes: list[int], target_axes: list[int]
) -> Box:
    within = relative(part, source)
    result = list(target)
    for source_axis, target_axis in zip(source_axes, target_axes, strict=True):
        zero = target[target_axis][0]
        start, stop = within[source_axis]
        result[target_axis] = (zero + start, zero + stop)
    return tuple(result)


def to_megatron(
    tensor: torch.Tensor, pair: BoxPair, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Elements of a Hugging Face box, arranged and shifted as Megatron holds them."""
    if pair.transpose:
        tensor = tensor.transpose(-1, -2)
    tensor = tensor.reshape(shape)
    return tensor.to(dtype) + pair.offset if pair.offset else tensor


def to_hf(
    tensor: torch.Tensor, pair: BoxPair, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Elements of a Megatron box, arranged and shifted back as Hugging Face holds them."""
    if pair.offset:
        tensor = (tensor - pair.offset).to(dtype)
    if pair.transpose:
        return tensor.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    return tensor.reshape(shape)


def read_megatron(plan: ConversionPlan, key: str, box: Box, read: Read) -> torch.Tensor:
    """One box of a Megatron tensor, from Hugging Face tensors; padding is zero.

    Returns a new tensor of shape ``box_shape(box)`` in the dtype that the plan gives the key.
    """
    dtype = torch_dtype(plan.megatron[key].dtype)
    tensor = torch.empty(box_shape(box), dtype=dtype)
    for shared in plan.padding_in(key, box):
        tensor[slices(relative(shared, box))] = 0
    for shared, copy in plan.copies_to(key, box):
        part = read(copy.hf_name, hf_part(copy, shared))
        target = relative(shared, box)
        tensor[slices(target)] = to_megatron(part, copy, box_shape(target), dtype)
    return tensor


def read_hf(plan: ConversionPlan, name: str, box: Box, read: Read) -> torch.Tensor:
    """One box of a Hugging Face tensor, from Megatron tensors, in the dtype of the plan."""
    dtype = torch_dtype(plan.hf[name].dtype)
    tensor = torch.empty(box_shape(box), dtype=dtype)
    for shared, copy in plan.copies_from(name, box):
        part = read(copy.megatron_key, megatron_part(copy, shared))
        target = relative(shared, box)
        tensor[slices(target)] = to_hf(part, copy, box_shape(target), dtype)
    return tensor


def assemble(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A whole Megatron parameter from whole Hugging Face tensors by role.

    Raises LayoutError if the shapes do not fit.
    """
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    shape = layout.megatron_shape(shapes)
    first = next(iter(tensors.values()))
    result = first.new_zeros(shape)
    for piece in layout.pieces(shapes):
        part = tensors[piece.role][slices(piece.hf_box)]
        target = box_shape(piece.megatron_box)
        result[slices(piece.megatron_box)] = to_megatron(part, piece, target, result.dtype)
    return result


def disassemble(layout: Layout, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whole Hugging Face tensors by role from a whole Megatron parameter.

    Raises LayoutError if the shape does not fit.
    """
    shapes = layout.hf_shapes(tuple(tensor.shape))
    result = {role: tensor.new_empty(shape) for role, shape in shapes.items()}
    for piece in layout.pieces(shapes):
        part = tensor[slices(piece.megatron_box)]
        target = box_shape(piece.hf_box)
        result[piece.role][slices(piece.hf_box)] = to_hf(part, piece, target, tensor.dtype)
    return result
