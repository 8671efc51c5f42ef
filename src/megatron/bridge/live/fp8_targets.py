"""Targets in FP8: what is quantized on the way, by scales that all ranks find together.

A block of 128 x 128 values may lie on several ranks. Each finds the largest magnitude in its part
of every block; the largest of all ranks, one collective, gives every rank all scales. Then each
rank quantizes what it sends, and the scales are tensors that every rank holds: nobody has to be
sent them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.demand import source_of
from megatron.bridge.exchange.fp8_blocks import largest_of_blocks, scales_of
from megatron.bridge.exchange.held_values import HeldValues, Quantizing
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy
from megatron.bridge.models.hf_pretrained.quantization import SCALE_DTYPES, STORED_DTYPE, BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, blocks_of, full_box, slices, volume
from megatron.bridge.tensors.spec import TensorSpec

_COMPUTED_BYTES = 8 << 20
"""Of values that are computed at once."""


class _Asked(NamedTuple):
    """What a rank wants of FP8: names of weights in e4m3, names and dtypes of scales."""

    weights: tuple[str, ...]
    scales: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, landings: Iterable[Landing], plan: ConversionPlan) -> Self:
        dtypes = dict.fromkeys((one.name, safetensors_dtype(one.out.dtype)) for one in landings)
        return cls(
            tuple(name for name, dtype in dtypes if dtype == STORED_DTYPE and name in plan.hf),
            tuple(
                (name, dtype)
                for name, dtype in dtypes
                if name not in plan.hf and name.removesuffix(SCALE_SUFFIX) in plan.hf
            ),
        )


class _Part(NamedTuple):
    """A part of a weight that this rank holds: the values of a box of it.

    Attributes:
        name: of the weight.
        values: those of the Megatron tensor.
        copy: between them and the weight.
        box: of the weight.
        dtype: that values are rounded to before they are quantized.
    """

    name: str
    values: HeldValues
    copy: Copy
    box: Box
    dtype: torch.dtype

    def boxes(self) -> Iterable[Box]:
        """The box, in parts where values are computed."""
        if not self.values.is_computed:
            return (self.box,)
        return blocks_of(self.box, self.values.dtype.itemsize, _COMPUTED_BYTES)


class FP8Targets:
    """The weights that are wanted in FP8, and their scales.

    Args:
        plan: of the model that is not quantized.
        scale_dtypes: that of the scales, by the name of each weight.
        block: extents of a block.
        device: of the scales.

    Attributes:
        plan: of the model with these weights quantized, and their scales as tensors.
        held: the scales, which every rank holds.
        quantizing: how they are packed.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        scale_dtypes: Mapping[str, str],
        block: BlockFP8,
        device: torch.device,
    ) -> None:
        self._block = block
        unquantized = {name: plan.hf[name].dtype for name in scale_dtypes}
        self.quantizing = Quantizing(block, unquantized)
        specs = [
            TensorSpec(name + SCALE_SUFFIX, block.scale_shape(plan.hf[name].shape), dtype)
            for name, dtype in scale_dtypes.items()
        ]
        self.plan = _with_scales(plan, {spec.name: spec for spec in specs})
        self._sources: dict[str, list[str]] = {}
        for name in scale_dtypes:
            self._sources.setdefault(source_of(plan, name), []).append(name)
        ends = [0, *accumulate(volume(full_box(spec.shape)) for spec in specs)]
        self._largest = torch.zeros(ends[-1], dtype=torch.float32, device=device)
        self._of_name = {
            name: self._largest[start:stop].view(spec.shape)
            for name, spec, (start, stop) in zip(scale_dtypes, specs, pairwise(ends), strict=True)
        }
        self._scales = {
            dtype: torch.ones(ends[-1], dtype=torch_dtype(dtype), device=device)
            for dtype in dict.fromkeys(scale_dtypes.values())
        }
        self.held = [
            LocalTensor(
                spec.name,
                spec.shape,
                full_box(spec.shape),
                self._scales[spec.dtype][start:stop].view(spec.shape),
                is_padded=False,
                is_main=True,
            )
            for spec, (start, stop) in zip(specs, pairwise(ends), strict=True)
        ]
        self._parts: list[_Part] = []

    @classmethod
    def of(
        cls,
        plan: ConversionPlan,
        landings: Sequence[Landing],
        block: BlockFP8 | None,
        ranks: Ranks,
        device: torch.device,
    ) -> Self | None:
        """What the targets of all ranks want in FP8; None if that is nothing.

        Args:
            plan: of the model.
            landings: of this rank.
            block: extents of a block, None where they are not known.
            ranks: all call this.
            device: of the scales.

        Raises:
            InputError: weights are wanted without their scales, or scales without knowing the
                extents of a block; on every rank alike.
        """
        asked = ranks.all_once(_Asked.of(landings, plan))
        weights = dict.fromkeys(name for one in asked for name in one.weights)
        dtypes: dict[str, str] = {}
        for rank, one in zip(ranks.numbers, asked, strict=True):
            for name, dtype in one.scales:
                if dtypes.setdefault(name.removesuffix(SCALE_SUFFIX), dtype) != dtype:
                    other = dtypes[name.removesuffix(SCALE_SUFFIX)]
                    raise InputError(
                        f"{name}: rank {rank} wants these scales in {dtype}, another in {other}; "
                        f"give memory of one dtype on all ranks"
                    )
        if not weights and not dtypes:
            return None
        if block is None:
            first = next(iter([*weights, *(name + SCALE_SUFFIX for name in dtypes)]))
            raise InputError(
                f"{first} is wanted in FP8, and the model's config has no quantization_config: "
                f"give the FP8 release, or its quantization_config, as fp8="
            )
        for name in [*weights, *dtypes]:
            if (problem := _problem(plan, name, dtypes.get(name))) is not None:
                raise InputError(problem)
        ordered = {name: dtypes[name] for name in plan.hf if name in dtypes}
        return cls(plan, ordered, block, device)

    @property
    def nbytes(self) -> int:
        """That the scales take, and what they are found from."""
        return self._largest.nbytes + sum(one.nbytes for one in self._scales.values())

    def look_at(self, held: Iterable[LocalTensor]) -> None:
        """Take the scales of these values from now on: what this rank holds of the model."""
        self._parts = list(self._parts_of(held))

    def find(self, ranks: Ranks) -> None:
        """Find the scales of the values that the ranks hold now; every rank calls this.

        Raises:
            InputError: a weight holds values that are not finite, or another rank cannot go on.
        """
        self._largest.zero_()
        ranks.agreed(self._find_own, self._largest.device)
        if ranks.are_joined:
            most = dist.ReduceOp.MAX
            ranks.done(lambda: dist.all_reduce(self._largest, most, ranks.group, async_op=True))
        for scales in self._scales.values():
            scales.copy_(scales_of(self._largest, scales.dtype))

    def _find_own(self) -> None:
        for part in self._parts:
            for box in part.boxes():
                found = largest_of_blocks(
                    part.values.in_hf_axes(part.copy, box), self._block, self._block.first(box)
                )
                place = self._of_name[part.name][slices(self._block.scale_box(box))]
                # Values are rounded before they are quantized, and the largest stays so.
                torch.maximum(place, found.to(part.dtype).float(), out=place)
        if not bool(torch.isfinite(self._largest).all()):
            name = next(
                name for name, one in self._of_name.items() if not bool(one.isfinite().all())
            )
            raise InputError(
                f"{name}: it holds values that are not finite, and cannot be quantized"
            )

    def _parts_of(self, held: Iterable[LocalTensor]) -> Iterator[_Part]:
        for one in held:
            for shared, copy in self.plan.joined_copies_to(one.key, one.box):
                for name in self._sources.get(copy.hf_name, ()):
                    dtype = torch_dtype(self.quantizing.unquantized[name])
                    yield _Part(name, HeldValues(one), copy, hf_part(copy, shared), dtype)


def _with_scales(plan: ConversionPlan, scales: Mapping[str, TensorSpec]) -> ConversionPlan:
    """A plan whose weights are quantized, each with its scales, which are tensors on both sides."""
    hf = {}
    for name, spec in plan.hf.items():
        hf[name] = spec
        if (scale := scales.get(name + SCALE_SUFFIX)) is not None:
            hf[name] = replace(spec, dtype=STORED_DTYPE)
            hf[scale.name] = scale
    copies = [
        Copy(name, full_box(spec.shape), name, full_box(spec.shape))
        for name, spec in scales.items()
    ]
    return replace(
        plan, hf=hf, megatron={**plan.megatron, **scales}, copies=(*plan.copies, *copies)
    )


def _problem(plan: ConversionPlan, name: str, scale_dtype: str | None) -> str | None:
    """Why a weight cannot be quantized as it is wanted."""
    scale, shape = name + SCALE_SUFFIX, plan.hf[name].shape
    if len(shape) < 2:
        return f"{name} is wanted in FP8 and has shape {shape}; blocks need two axes"
    if scale_dtype is None:
        return f"{name} is wanted in FP8, and no rank wants its scales; add {scale} to the targets"
    if scale_dtype not in SCALE_DTYPES:
        return f"{scale}: its memory is {scale_dtype}; scales are {' or '.join(SCALE_DTYPES)}"
    return None
