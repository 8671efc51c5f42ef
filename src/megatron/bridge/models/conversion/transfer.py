"""Moving elements along boxes: the only place where a plan or a layout touches tensors.

Everything is built on two functions of a pair of boxes, whichever side is read: where a part of
one box lies on the other side, and how the elements are arranged there.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.box_pairs import BoxPair, hf_part, megatron_part
from megatron.bridge.models.conversion.boxes import Box, box_shape, relative, slices
from megatron.bridge.models.conversion.layout import Layout
from megatron.bridge.models.conversion.plan import ConversionPlan

type Read = Callable[[str, Box], torch.Tensor]
"""Reads one box of a named tensor: ``read(name, box)`` of shape ``box_shape(box)``."""


def to_megatron(
    tensor: torch.Tensor, pair: BoxPair, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Elements of a Hugging Face box, arranged and shifted as Megatron holds them."""
    if pair.transpose:
        tensor = tensor.transpose(-1, -2)
    tensor = _widened(tensor.reshape(shape), dtype)
    return tensor + pair.offset if pair.offset else tensor


def to_hf(
    tensor: torch.Tensor, pair: BoxPair, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Elements of a Megatron box, arranged and shifted back as Hugging Face holds them."""
    if pair.offset:
        tensor = (tensor.float() - pair.offset).to(dtype)
    tensor = _widened(tensor, dtype)
    if pair.transpose:
        return tensor.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    return tensor.reshape(shape)


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, which holds all values of its own. Raises InputError otherwise."""
    if tensor.dtype != dtype and torch.promote_types(tensor.dtype, dtype) != dtype:
        raise InputError(f"values in {tensor.dtype} may not fit into {dtype}; cast them first")
    return tensor.to(dtype)


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


def inexact_offsets(plan: ConversionPlan, read: Read) -> Iterator[tuple[str, float]]:
    """(Hugging Face name, largest error) of tensors that do not survive their offset.

    Adding a constant rounds where the result needs more bits than it has. `read` is of Hugging
    Face tensors.
    """
    for copy in plan.copies:
        if copy.offset:
            tensor = read(copy.hf_name, copy.hf_box)
            dtype = torch_dtype(plan.megatron[copy.megatron_key].dtype)
            shifted = to_megatron(tensor, copy, box_shape(copy.megatron_box), dtype)
            back = to_hf(shifted, copy, tuple(tensor.shape), tensor.dtype)
            if not torch.equal(back, tensor):
                yield copy.hf_name, float((back.double() - tensor.double()).abs().max())


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
