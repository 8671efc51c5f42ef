"""Moving elements along boxes: the only place where a plan or a layout touches tensors.

Everything is built on two functions of a pair of boxes, whichever side is read: where a part of
one box lies on the other side, and how the elements are arranged there.
"""

from collections.abc import Callable, Iterator

import torch

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.models.conversion.casting import EXACTLY, ROUNDED, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.box_pairs import BoxPair, hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, box_shape, relative, row_blocks, slices
from megatron.bridge.tensors.source import Source

_CAST_BYTES = 1 << 20


def to_megatron(
    tensor: torch.Tensor,
    pair: BoxPair,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    culprit: str = "",
) -> torch.Tensor:
    """Elements of a Hugging Face box, arranged and shifted as Megatron holds them.

    Raises InexactCast, which begins with `culprit`, for values that do not fit `dtype`.
    """
    if pair.transpose:
        tensor = tensor.transpose(-1, -2)
    tensor = EXACTLY.cast(tensor.reshape(shape), dtype, culprit)
    return tensor + pair.offset if pair.offset else tensor


def to_hf(
    tensor: torch.Tensor,
    pair: BoxPair,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    casting: Casting = ROUNDED,
    culprit: str = "",
) -> torch.Tensor:
    """Elements of a Megatron box, arranged and shifted back as Hugging Face holds them.

    Raises InexactCast, which begins with `culprit`, for values that `casting` does not admit.
    """
    if pair.offset:
        tensor = _shifted_back(tensor, pair.offset, dtype, casting, culprit)
    else:
        tensor = casting.cast(tensor, dtype, culprit)
    if pair.transpose:
        return tensor.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    return tensor.reshape(shape)


def _shifted_back(
    tensor: torch.Tensor, offset: float, dtype: torch.dtype, casting: Casting, culprit: str
) -> torch.Tensor:
    """``tensor - offset`` in `dtype`.

    A narrow result is exact if it is the difference, or if it makes `tensor` again: the difference
    itself was rounded, and the narrow value is then as near as anything can be told.
    """
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    difference = wide - offset
    result = difference.to(dtype)
    back = result.to(difference.dtype)
    exact = (back == difference) | (back + offset == wide) | difference.isnan()
    casting.check(difference, back, exact, dtype, culprit)
    return result


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
            tensor = torch.empty(box_shape(hf_box), dtype=stored, device="cpu")
            source.read_into(copy.hf_name, hf_box, tensor)
            part.copy_(to_megatron(tensor, copy, tuple(part.shape), out.dtype, copy.hf_name))


def fill_hf(
    plan: ConversionPlan,
    name: str,
    box: Box,
    out: torch.Tensor,
    source: Source,
    casting: Casting = EXACTLY,
) -> None:
    """Fill `out` with one box of a Hugging Face tensor, from Megatron tensors.

    out: of shape ``box_shape(box)``, any strides, in the dtype that the tensor is to have. Raises
    InexactCast for values that do not fit it and that `casting` does not admit.
    """
    for whole, copy in plan.copies_from(name, box):
        stored = torch_dtype(source.dtype_of(copy.megatron_key))
        for shared in _cast_at_once(whole, stored, out.dtype):
            part, megatron_box = out[slices(relative(shared, box))], megatron_part(copy, shared)
            if stored == out.dtype and not copy.offset:
                view = _seen_from_megatron(part, copy, megatron_box)
                source.read_into(copy.megatron_key, megatron_box, view)
            else:
                tensor = torch.empty(box_shape(megatron_box), dtype=stored, device=out.device)
                source.read_into(copy.megatron_key, megatron_box, tensor)
                culprit = f"{name} from {copy.megatron_key}"
                part.copy_(to_hf(tensor, copy, tuple(part.shape), out.dtype, casting, culprit))


def _cast_at_once(box: Box, stored: torch.dtype, dtype: torch.dtype) -> Iterator[Box]:
    """A box in parts that are cast one by one: looking for what does not fit takes memory."""
    if stored.itemsize <= dtype.itemsize:
        yield box
        return
    for part in row_blocks(box_shape(box), stored.itemsize, _CAST_BYTES):
        yield tuple(
            (start + first, start + last)
            for (start, _), (first, last) in zip(box, part, strict=True)
        )


def fill_export(
    plan: ConversionPlan,
    name: str,
    box: Box,
    out: torch.Tensor,
    source: Source,
    reference: Callable[[], Source],
    casting: Casting = EXACTLY,
) -> None:
    """Fill `out` with one box of a tensor of an export, whichever side it comes from.

    source: of Megatron tensors. reference: gives the source of what is carried; it is asked for
    such a tensor only. A copy of another tensor is made anew, so that the two stay equal.
    """
    if (copy := plan.equal.get(name)) is not None:
        name = copy.name
    if name in plan.carried:
        reference().read_into(name, box, out)
    else:
        fill_hf(plan, name, box, out, source, casting)


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
    tensor = torch.empty(box_shape(box), dtype=torch_dtype(plan.megatron[key].dtype), device="cpu")
    fill_megatron(plan, key, box, tensor, source)
    return tensor


def read_hf(
    plan: ConversionPlan, name: str, box: Box, source: Source, casting: Casting = EXACTLY
) -> torch.Tensor:
    """One box of a Hugging Face tensor in new memory, in the plan's dtype; see `fill_hf`."""
    tensor = torch.empty(box_shape(box), dtype=torch_dtype(plan.hf[name].dtype), device="cpu")
    fill_hf(plan, name, box, tensor, source, casting)
    return tensor


def inexact_offsets(plan: ConversionPlan, source: Source) -> Iterator[tuple[str, float]]:
    """(Hugging Face name, largest error) of tensors that do not survive their offset.

    Adding a constant rounds where the result needs more bits than it has. `source` is of Hugging
    Face tensors.
    """
    for copy in plan.copies:
        if copy.offset:
            stored = torch_dtype(source.dtype_of(copy.hf_name))
            tensor = torch.empty(box_shape(copy.hf_box), dtype=stored, device="cpu")
            source.read_into(copy.hf_name, copy.hf_box, tensor)
            dtype = torch_dtype(plan.megatron[copy.megatron_key].dtype)
            shifted = to_megatron(tensor, copy, box_shape(copy.megatron_box), dtype)
            back = to_hf(shifted, copy, tuple(tensor.shape), tensor.dtype)
            if not torch.equal(back, tensor):
                yield copy.hf_name, float((back.double() - tensor.double()).abs().max())
