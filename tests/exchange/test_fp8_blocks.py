"""FP8 by block of parts that cut blocks: as of the whole tensor, by what writes FP8 files."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.exchange.fp8_blocks import largest_of_blocks, quantize_to, scales_of
from megatron.bridge.formats.fp8_writer import block_scales, quantize
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.tensors.boxes import Box, full_box, slices
from megatron.bridge.tensors.torch_views import as_array, as_torch

BLOCK = BlockFP8(24, 40)
SHAPE = 3, 70, 130
"""No multiple of a block along any axis."""


def values(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers of all sizes, with a block of zeros and one of numbers that are hardly any."""
    draw = torch.Generator().manual_seed(5)
    tensor = torch.randn(shape, generator=draw)
    tensor *= torch.exp2(torch.randint(-30, 12, shape, generator=draw).float())
    tensor[..., :24, :40] = 0
    tensor[..., 24:48, :40] *= 1e-36
    return tensor.to(dtype)


def of_the_whole(
    weight: torch.Tensor, block: BlockFP8, scale_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and scales, as FP8 files are written."""
    scales = block_scales(as_array(weight), block, numpy_dtype(scale_dtype))
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    quantize(as_array(weight), scales, block, as_array(out))
    return out, as_torch(scales)


def parts(shape: tuple[int, ...], cuts: tuple[tuple[int, ...], tuple[int, ...]]) -> list[Box]:
    *leading, rows, columns = shape
    return [
        (*full_box(tuple(leading)), row, column)
        for row, column in product(pairwise((0, *cuts[0], rows)), pairwise((0, *cuts[1], columns)))
    ]


CUTS = [((), ()), ((24,), (80,)), ((5, 23, 47), (39, 41)), ((69,), (1, 2, 129))]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
def test_parts_make_the_whole(
    cuts: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, scale_dtype: str
) -> None:
    weight = values(dtype=dtype)
    largest = torch.zeros(BLOCK.scale_shape(SHAPE))
    for box in parts(SHAPE, cuts):
        found = largest_of_blocks(weight[slices(box)], BLOCK, BLOCK.first(box))
        place = largest[slices(BLOCK.scale_box(box))]
        torch.maximum(place, found, out=place)
    scales = scales_of(largest, getattr(torch, {"BF16": "bfloat16", "F32": "float32"}[scale_dtype]))
    out = torch.zeros(SHAPE, dtype=torch.float8_e4m3fn)
    for box in parts(SHAPE, cuts):
        part = scales[slices(BLOCK.scale_box(box))]
        quantize_to(out[slices(box)], weight[slices(box)], part, BLOCK, BLOCK.first(box))
    expected, expected_scales = of_the_whole(weight, BLOCK, scale_dtype)
    assert torch.equal(scales.float(), expected_scales)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    assert len(out.view(torch.uint8).unique()) > 100


def test_many_rows_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = largest_of_blocks(values(), BLOCK, (7, 3))
    out, in_parts = (torch.zeros(SHAPE, dtype=torch.float8_e4m3fn) for _ in range(2))
    quantize_to(out, values(), scales_of(whole, torch.float32), BLOCK, (7, 3))
    monkeypatch.setattr("megatron.bridge.exchange.fp8_blocks._AT_ONCE", 1)
    assert torch.equal(largest_of_blocks(values(), BLOCK, (7, 3)), whole)
    quantize_to(in_parts, values(), scales_of(whole, torch.float32), BLOCK, (7, 3))
    assert torch.equal(out.view(torch.uint8), in_parts.view(torch.uint8))


def test_turned_memory() -> None:
    turned = values((130, 70)).mT
    expected, scales = of_the_whole(turned.contiguous(), BLOCK, "F32")
    out = torch.zeros((130, 70), dtype=torch.float8_e4m3fn).mT
    assert torch.equal(scales_of(largest_of_blocks(turned, BLOCK), torch.float32), scales)
    quantize_to(out, turned, scales, BLOCK)
    assert torch.equal(out.contiguous().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found(number: float) -> None:
    weight = values()
    weight[1, 30, 90] = number
    finite = largest_of_blocks(weight, BLOCK).isfinite()
    assert (~finite).nonzero().tolist() == [[1, 1, 2]]


def test_as_transformers_quantizes() -> None:
    """It multiplies by a reciprocal where we divide: the last bit differs now and then."""
    config = SimpleNamespace(weight_block_size=(24, 40), scale_fmt="float")
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=config))
    weight = torch.randn(48, 120, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = theirs.convert({"some.weight": weight})
    ours, scales = of_the_whole(weight, BLOCK, "F32")
    torch.testing.assert_close(scales, found["some.weight_scale_inv"], rtol=3e-7, atol=0)
    codes = [one.view(torch.int8).int() for one in (ours, found["some.weight"])]
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert (codes[0] != codes[1]).float().mean() < 5e-3
