"""Two boxes that hold the same elements, and where a part of one lies in the other."""

from typing import Protocol

from megatron.bridge.tensors.boxes import Box, relative


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


def axis_pairs(pair: BoxPair) -> list[tuple[int, int]]:
    """(axis of the Megatron box, the same of the Hugging Face box), as the first follow each other.

    Of the axes of extent above 1.
    """
    return list(zip(*_axes(pair), strict=True))


def axes_in_hf_order(pair: BoxPair) -> list[int]:
    """The axes of extent above 1 of the Megatron box, as those of the Hugging Face box follow."""
    return [axis for _, axis in sorted((of_hf, axis) for axis, of_hf in axis_pairs(pair))]


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
