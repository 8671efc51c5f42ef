"""Moving elements along boxes: the only place where a plan or a layout touches tensors.

Everything is built on two functions of a pair of boxes, whichever side is read: where a part of
one box lies on the other side, and how the elements are arranged there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.models.conversion.casting import EXACTLY, ROUNDED, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.arrays import Array, copy, empty
from megatron.bridge.tensors.box_pairs import BoxPair, hf_part, megatron_part
from megatron.bridge.tensors.boxes import Box, Shape, blocks_of, box_shape, relative, slices
from megatron.bridge.tensors.source import Source, read_box

_CAST_BYTES = 1 << 20


def to_megatron(
    array: Array,
    pair: BoxPair,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    culprit: str = "",
) -> Array:
    """Elements of a Hugging Face box, arranged and shifted as Megatron holds them.

    Args:
        array: the elements of the whole `pair.hf_box`, or of a part of it.
        pair: says how they are arranged and shifted.
        shape: of the result.
        dtype: of the result.
        culprit: whose values they are, to begin a message with.

    Raises:
        InexactCast: values do not fit `dtype`.
    """
    if pair.transpose:
        array = array.swapaxes(-1, -2)
    array = EXACTLY.cast(array.reshape(shape), dtype, culprit)
    return _shifted(array, pair.offset) if pair.offset else array


def to_hf(
    array: Array,
    pair: BoxPair,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    casting: Casting = ROUNDED,
    culprit: str = "",
) -> Array:
    """Elements of a Megatron box, arranged and shifted back as Hugging Face holds them.

    Args:
        array: the elements of the whole `pair.megatron_box`, or of a part of it.
        pair: says how they are arranged and shifted.
        shape: of the result.
        dtype: of the result.
        casting: of values that `dtype` does not hold.
        culprit: whose values they are, to begin a message with.

    Raises:
        InexactCast: see `casting`.
    """
    if pair.offset:
        array = _shifted_back(array, pair.offset, dtype, casting, culprit)
    else:
        array = casting.cast(array, dtype, culprit)
    if pair.transpose:
        return array.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
    return array.reshape(shape)


def _shifted(array: Array, offset: float) -> Array:
    """``array + offset``, computed at least in float32 and rounded to the dtype of the array."""
    wide = array.astype(_at_least_float32(array.dtype), copy=False)
    return (wide + wide.dtype.type(offset)).astype(array.dtype, copy=False)


def _at_least_float32(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def _shifted_back(
    array: Array, offset: float, dtype: np.dtype[Any], casting: Casting, culprit: str
) -> Array:
    """``array - offset`` in `dtype`.

    A narrow result is exact if it is the difference, or if it makes `array` again: the difference
    itself was rounded, and the narrow value is then as near as anything can be told.
    """
    wide = array.astype(_at_least_float32(array.dtype), copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # the check looks at what comes out
        difference = wide - wide.dtype.type(offset)
        result = difference.astype(dtype)
        back = result.astype(difference.dtype)
        shifted = back + wide.dtype.type(offset)
    exact = (back == difference) | (shifted == wide) | np.isnan(difference)
    casting.check(difference, back, exact, dtype, culprit)
    return result


def fill_megatron(plan: ConversionPlan, key: str, box: Box, out: Array, source: Source) -> None:
    """Fill `out` with one box of a Megatron tensor, from Hugging Face tensors; padding is zero.

    Args:
        plan: of the model.
        key: of the Megatron tensor.
        box: of that tensor.
        out: of shape ``box_shape(box)`` in the dtype that the plan gives the key; any strides.
        source: of Hugging Face tensors.
    """
    for shared in plan.padding_in(key, box):
        out[slices(relative(shared, box))] = 0
    for shared, pair in plan.copies_to(key, box):
        part, hf_box = out[slices(relative(shared, box))], hf_part(pair, shared)
        stored = numpy_dtype(source.dtype_of(pair.hf_name))
        if stored == out.dtype and not pair.offset:
            source.read_into(pair.hf_name, hf_box, _in_hf_axes(part, pair, hf_box))
        else:
            array = read_box(source, pair.hf_name, hf_box)
            copy(to_megatron(array, pair, part.shape, out.dtype, pair.hf_name), part)


def fill_hf(
    plan: ConversionPlan,
    name: str,
    box: Box,
    out: Array,
    source: Source,
    casting: Casting = EXACTLY,
) -> None:
    """Fill `out` with one box of a Hugging Face tensor, from Megatron tensors.

    Args:
        plan: of the model.
        name: of the Hugging Face tensor.
        box: of that tensor.
        out: of shape ``box_shape(box)``, any strides, in the dtype that the tensor is to have.
        source: of Megatron tensors.
        casting: of values that this dtype does not hold.

    Raises:
        InexactCast: see `casting`.
    """
    casting = casting.of(name)
    for whole, pair in plan.copies_from(name, box):
        stored = numpy_dtype(source.dtype_of(pair.megatron_key))
        for shared in _cast_at_once(whole, stored, out.dtype):
            part, megatron_box = out[slices(relative(shared, box))], megatron_part(pair, shared)
            if stored == out.dtype and not pair.offset:
                view = _in_megatron_axes(part, pair, megatron_box)
                source.read_into(pair.megatron_key, megatron_box, view)
            else:
                array = read_box(source, pair.megatron_key, megatron_box)
                culprit = f"{name} from {pair.megatron_key}"
                copy(to_hf(array, pair, part.shape, out.dtype, casting, culprit), part)


def _cast_at_once(box: Box, stored: np.dtype[Any], dtype: np.dtype[Any]) -> Iterator[Box]:
    """A box in parts that are cast one by one: looking for what does not fit takes memory."""
    if stored.itemsize <= dtype.itemsize:
        return iter([box])
    return blocks_of(box, stored.itemsize, _CAST_BYTES)


def fill_export(
    plan: ConversionPlan,
    name: str,
    box: Box,
    out: Array,
    source: Source,
    reference: Callable[[], Source],
    casting: Casting,
) -> None:
    """Fill `out` with one box of a tensor of an export, whichever side it comes from.

    A copy of another tensor is made anew, so that the two stay equal.

    Args:
        plan: of the model.
        name: of the Hugging Face tensor.
        box: of that tensor.
        out: as of `fill_hf`.
        source: of Megatron tensors.
        reference: gives the source of what is carried; it is asked for such a tensor only.
        casting: as of `fill_hf`.

    Raises:
        InexactCast: see `casting`.
    """
    if (copy := plan.equal.get(name)) is not None:
        name = copy.name
    if name in plan.carried:
        reference().read_into(name, box, out)
    else:
        fill_hf(plan, name, box, out, source, casting)


def _in_hf_axes(part: Array, pair: BoxPair, hf_box: Box) -> Array:
    """A part of a Megatron tensor, its axes in the order of the Hugging Face box it stands for."""
    shape = box_shape(hf_box)
    if pair.transpose:
        return _viewed(part, (*shape[:-2], shape[-1], shape[-2])).swapaxes(-1, -2)
    return _viewed(part, shape)


def _in_megatron_axes(part: Array, pair: BoxPair, megatron_box: Box) -> Array:
    """A part of a Hugging Face tensor, its axes in the order of the Megatron box it stands for."""
    turned = part.swapaxes(-1, -2) if pair.transpose else part
    return _viewed(turned, box_shape(megatron_box))


def _viewed(array: Array, shape: Shape) -> Array:
    """The same memory in another shape. Raises ValueError where that takes a copy."""
    return array.reshape(shape, copy=False)


def read_hf(
    plan: ConversionPlan, name: str, box: Box, source: Source, casting: Casting = EXACTLY
) -> Array:
    """One box of a Hugging Face tensor in new memory, in the plan's dtype; see `fill_hf`."""
    array = empty(box_shape(box), plan.hf[name].dtype)
    fill_hf(plan, name, box, array, source, casting)
    return array


def inexact_offsets(plan: ConversionPlan, source: Source) -> Iterator[tuple[str, float]]:
    """(Hugging Face name, largest error) of tensors that do not survive their offset.

    Adding a constant rounds where the result needs more bits than it has. `source` is of Hugging
    Face tensors.
    """
    for pair in plan.copies:
        if pair.offset:
            array = read_box(source, pair.hf_name, pair.hf_box)
            dtype = numpy_dtype(plan.megatron[pair.megatron_key].dtype)
            shifted = to_megatron(array, pair, box_shape(pair.megatron_box), dtype)
            back = to_hf(shifted, pair, array.shape, array.dtype)
            if (back != array).any():
                error = np.abs(back.astype(np.float64) - array.astype(np.float64)).max()
                yield pair.hf_name, float(error)
