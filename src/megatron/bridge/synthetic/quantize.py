"""The FP8 form of released models: e4m3 weights with one scale per block of 128 x 128.

A matrix [out, in] gets scales [ceil(out / 128), ceil(in / 128)], named `weight_scale_inv` although
a weight is its stored value *times* the scale. Blocks at the edge are smaller.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX

if TYPE_CHECKING:
    import torch

BLOCK = 128


def scale_shape(matrix: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix."""
    return BlockFP8(BLOCK, BLOCK).scale_shape(matrix)


def quantize(matrix: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [out, in] as e4m3, and its scales in `scale_dtype`.

    A block's scale is its largest magnitude / 448, rounded first, so that both fit together.
    """
    import torch

    from megatron.bridge.exchange.fp8_blocks import largest_of_blocks, quantize_to, scales_of

    block = BlockFP8(BLOCK, BLOCK)
    scales = scales_of(largest_of_blocks(matrix, block), scale_dtype)
    values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
    quantize_to(values, matrix, scales, block)
    return values, scales


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model with these tensors on disk."""
    everything = set(names)
    plain = sorted(
        name.removesuffix(".weight")
        for name in everything
        if name.endswith(".weight") and name + SCALE_SUFFIX not in everything
    )
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": plain,
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
