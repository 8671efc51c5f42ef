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
from megatron.bridge.models.conversion.source import Source


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


def fill_megatron(
    plan: ConversionPlan, key: str, box: Box, out: torch.Tensor, source: Source
) -> None:
    """Fill `out` with one box of a Megatron tensor, from Hugging Face tensors; padding is zero.

    out: of shape ``box_shape(box)`` in the dtype that the plan gives the key; any strides.
    """
    for shared in plan.padding_in(key, box):
        out[slices(relative(shared, box))] = 0
    for shared, copy in plan.copies_to(key, box):
        part, hf_box = out[slices(relative(shared, box))], hf_part(copy, shared)
        stored = torch_dtype(source.dtype_of(copy.hf_name))
        if stored == out.dtype and not copy.offset:
            source.read_into(copy.hf_name, hf_box, _seen_from_hf(part, copy, hf_box))
        else:
            tensor = torch.empty(box_shape(hf_box), dtype=stored)
            source.read_into(copy.hf_name, hf_box, tensor)
            part.copy_(to_megatron(tensor, copy, tuple(part.shape), out.dtype))


def fill_hf(plan: ConversionPlan, name: str, box: Box, out: torch.Tensor, source: Source) -> None:
    """Fill `out` with one box of a Hugging Face tensor, from Megatron tensors.

    out: of shape ``box_shape(box)`` in the dtype that the plan gives the tensor; any strides.
    """
    for shared, copy in plan.copies_from(name, box):
        part, megatron_box = out[slices(relative(shared, box))], megatron_part(copy, shared)
        stored = torch_dtype(source.dtype_of(copy.megatron_key))
        if stored == out.dtype and not copy.offset:
            view = _seen_from_megatron(part, copy, megatron_box)
            source.read_into(copy.megatron_key, megatron_box, view)
        else:
            tensor = torch.empty(box_shape(megatron_box), dtype=stored, device=out.device)
            source.read_into(copy.megatron_key, megatron_box, tensor)
            part.copy_(to_hf(tensor, copy, tuple(part.shape), out.dtype))


def fill_export(
    plan: ConversionPlan,
    name: str,
    box: Box,
    out: torch.Tensor,
    source: Source,
    reference: Callable[[], Source],
) -> None:
    """Fill `out` with one box of a tensor of an export, whichever side it comes from.

    source: of Megatron tensors. reference: gives the source of what is carried; it is asked for
    such a tensor only. A copy of another tensor is made anew, so that the two stay equal.
    """
    name = plan.equal.get(name, name)
    if name in plan.carried:
        reference().read_into(name, box, out)
    else:
        fill_hf(plan, name, box, out, source)


def _seen_from_hf(part: torch.Tensor, pair: BoxPair, hf_box: Box) -> torch.Tensor:
    """A part of a Megatron tensor, its axes in the order of the Hugging Face box it stands for."""
    shape = box_shape(hf_box)
    if pair.transpose:
        return part.view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    return part.view(shape)


def _seen_from_megatron(part: torch.Tensor, pair: BoxPair, megatron_box: Box) -> torch.Tensor:
    """A part of a Hugging Face tensor, its axes in the order of the Megatron box it stands for."""
    return (part.transpose(-1, -2) if pair.transpose else part).view(box_shape(megatron_box))


def read_megatron(plan: ConversionPlan, key: str, box: Box, source: Source) -> torch.Tensor:
    """One box of a Megatron tensor in new memory; see `fill_megatron`."""
    tensor = torch.empty(box_shape(box), dtype=torch_dtype(plan.megatron[key].dtype))
    fill_megatron(plan, key, box, tensor, source)
    return tensor


def read_hf(plan: ConversionPlan, name: str, box: Box, source: Source) -> torch.Tensor:
    """One box of a Hugging Face tensor in new memory; see `fill_hf`."""
    tensor = torch.empty(box_shape(box), dtype=torch_dtype(plan.hf[name].dtype))
    fill_hf(plan, name, box, tensor, source)
    return tensor


def inexact_offsets(plan: ConversionPlan, source: Source) -> Iterator[tuple[str, float]]:
    """(Hugging Face name, largest error) of tensors that do not survive their offset.

    Adding a constant rounds where the result needs more bits than it has. `source` is of Hugging
    Face tensors.
    """
    for copy in plan.copies:
        if copy.offset:
            stored = torch_dtype(source.dtype_of(copy.hf_name))
            tensor = torch.empty(box_shape(copy.hf_box), dtype=stored)
            source.read_into(copy.hf_name, copy.hf_box, tensor)
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
