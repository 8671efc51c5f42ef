"""Quantizing weights again, into the FP8 form of a reference: its tensors, names and scale dtypes.

The scale of a block is its largest magnitude / 448, the largest number of e4m3. A block whose
values are exactly multiples of e4m3 numbers and the reference's own scale keeps that scale, so what
was not changed since it was read from the reference comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained.fp8 import (
    SCALE_SUFFIX,
    BlockFP8,
    DequantizedTensors,
    block_rows,
    e4m3_to_float,
)
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

if TYPE_CHECKING:
    import torch

LARGEST = 448.0
"""The largest number of e4m3."""


def fp8_reference(reference: PreTrainedVLM) -> DequantizedTensors:
    """The weights of a reference that says how to quantize. Raises InputError for any other."""
    if reference.quantization is None:
        raise InputError(
            f"{reference.name_or_path} is not quantized, so it does not say how to write FP8; "
            f"give an FP8 release as the reference, or export without --fp8 (fp8=False)"
        )
    weights = reference.weights if reference.has_weights else None
    if not isinstance(weights, DequantizedTensors):
        raise InputError(
            f"{reference.name_or_path} holds no weights, so it does not say which of them are "
            f"quantized; give the whole FP8 release as the reference"
        )
    return weights


class Requantizer:
    """Makes the tensors of an FP8 reference from those of the dequantized model.

    Scales are kept, since files hold them before the weights that they belong to. They are small.
    """

    def __init__(
        self, reference: DequantizedTensors, weight: Callable[[str], torch.Tensor]
    ) -> None:
        """weight: gives a weight of the dequantized model by its name."""
        self._reference = reference
        self._weight = weight
        self._scales: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name as the reference's files have it. Raises CheckpointError."""
        quantized, block = self._reference.quantized, self._reference.quantization
        if name in quantized:
            return quantize(self._weight(name), self._scales_of(name), block)
        owner = name.removesuffix(SCALE_SUFFIX)
        if owner != name and owner in quantized:
            return self._scales_of(owner).to(torch_dtype(quantized[owner].dtype))
        return self._weight(name)

    def _scales_of(self, name: str) -> torch.Tensor:
        """Scales in float32, every one a number of the dtype that files hold."""
        if name not in self._scales:
            reference, dtype = self._reference, torch_dtype(self._reference.quantized[name].dtype)
            try:
                scales = block_scales(
                    self._weight(name),
                    reference.quantization,
                    dtype,
                    reference.read_scales(name),
                )
            except ValueError as error:
                raise CheckpointError(f"{name}: cannot be quantized: {error}") from error
            self._scales[name] = scales
        return self._scales[name]


def block_scales(
    weight: torch.Tensor,
    block: BlockFP8,
    dtype: torch.dtype,
    preferred: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales of a weight [..., rows, columns], rounded to `dtype` and given in float32.

    preferred: scales that are kept where the block's bfloat16 values come back exactly with them.
    A block of zeros has scale 1. Raises ValueError for values that are not finite.
    """
    import torch

    scales = torch.empty(block.scale_shape(tuple(weight.shape)))
    for number, (start, stop) in enumerate(block_rows(weight.shape[-2], block)):
        part = weight[..., start:stop, :]
        largest = _largest_of_blocks(part.float().abs(), block)
        if not torch.isfinite(largest).all():
            raise ValueError("it holds values that are not finite")
        # In float32 and then rounded: quantizing divides by what files hold.
        found = (largest / LARGEST).to(dtype).float()
        found[found == 0] = 1.0
        if preferred is not None:
            wanted = preferred[..., number, :]
            again = e4m3_to_float(_quotients(part, wanted, block).to(torch.float8_e4m3fn))
            again *= _spread(wanted, part, block)
            differs = again.to(weight.dtype).view(torch.int16) != part.view(torch.int16)
            exact = _largest_of_blocks(differs.to(torch.uint8), block) == 0
            found = torch.where(exact, wanted, found)
        scales[..., number, :] = found
    return scales


def quantize(weight: torch.Tensor, scales: torch.Tensor, block: BlockFP8) -> torch.Tensor:
    """A weight [..., rows, columns] as e4m3, divided by the float32 scales of its blocks."""
    import torch

    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for number, (start, stop) in enumerate(block_rows(weight.shape[-2], block)):
        part = weight[..., start:stop, :]
        result[..., start:stop, :] = _quotients(part, scales[..., number, :], block)
    return result


def _quotients(rows: torch.Tensor, scales: torch.Tensor, block: BlockFP8) -> torch.Tensor:
    """Values of one row of blocks by their scales [..., columns of blocks], in e4m3's range."""
    quotients: torch.Tensor = rows.float() / _spread(scales, rows, block)
    # A scale that was rounded down would push the largest value out of range.
    return quotients.clamp_(-LARGEST, LARGEST)


def _spread(scales: torch.Tensor, rows: torch.Tensor, block: BlockFP8) -> torch.Tensor:
    """The scale of each column of one row of blocks, to be multiplied with the rows."""
    import torch

    columns = torch.arange(rows.shape[-1]) // block.columns
    return scales[..., columns].unsqueeze(-2)


def _largest_of_blocks(rows: torch.Tensor, block: BlockFP8) -> torch.Tensor:
    """The largest of the non-negative values of each block in one row of blocks."""
    import torch

    of_columns = rows.amax(dim=-2)
    missing = -of_columns.shape[-1] % block.columns
    padded = torch.nn.functional.pad(of_columns, (0, missing))
    return padded.unflatten(-1, (-1, block.columns)).amax(dim=-1)
