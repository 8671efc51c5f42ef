"""FP8 releases as the BF16 model they stand for: quantized weights are dequantized when read.

A quantized weight is stored in e4m3, with one scale for each block of rows and columns in a tensor
of its own, named like the weight with `_scale_inv` behind it:

    weight = stored * scale        in float32, then rounded to bfloat16

Blocks follow the axes of the tensor as it is stored, the last two where experts are fused; those
at the edges are smaller. Which weights are quantized is read from the files; config.json says how.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING

from megatron.bridge.dtypes import numpy_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.quantization import (
    BlockFP8,
    check_tensors,
    quantization_of,
)
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.models.hf_pretrained.tensors import ReadableTensors, TensorIndex, TensorInfo
from megatron.bridge.tensors.boxes import Box, full_box
from megatron.bridge.tensors.source import read_box
from megatron.bridge.tensors.spec import TensorSpec, check_box

if TYPE_CHECKING:
    from megatron.bridge.tensors.arrays import Array

DEQUANTIZED_DTYPE = "BF16"
_CHECKED_BYTES = 4 << 20


def dequantized_view(
    tensors: Mapping[str, TensorSpec], quantization: BlockFP8 | None, origin: str
) -> dict[str, TensorSpec]:
    """The tensors of the dequantized model, in the order of the files; scales are left out.

    Without a quantization, the tensors as they are. Raises what `check_tensors` does.
    """
    check_tensors(tensors, quantization, origin)
    view = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        quantized = name + SCALE_SUFFIX in tensors
        dtype = DEQUANTIZED_DTYPE if quantized else tensor.dtype
        view[name] = TensorSpec(name, tuple(tensor.shape), dtype)
    return view


class DequantizedTensors(ReadableTensors[TensorSpec]):
    """The weights of an FP8 release, as a TensorIndex of the BF16 model would show and read them.

    Only headers are read to make it.

    Args:
        index: the files as they are.
        quantization: by the config.

    Raises:
        CheckpointError: see `dequantized_view`.
    """

    def __init__(self, index: TensorIndex, quantization: BlockFP8) -> None:
        self.index = index
        self.quantization = quantization
        self._view = dequantized_view(index, quantization, str(index.folder))

    def __getitem__(self, name: str) -> TensorSpec:
        return self._view[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._view)

    def __len__(self) -> int:
        return len(self._view)

    @cached_property
    def quantized(self) -> Mapping[str, TensorInfo]:
        """The tensors of scales, each by the name of its quantized weight."""
        return {
            name: self.index[name + SCALE_SUFFIX]
            for name in self._view
            if name + SCALE_SUFFIX in self.index
        }

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") in which a tensor is read. Raises CheckpointError if unknown."""
        return DEQUANTIZED_DTYPE if name in self.quantized else self.index.dtype_of(name)

    def place(self, name: str) -> TensorInfo | None:
        """Where the bytes of a tensor that is not quantized lie; see ReadableTensors.place."""
        return None if name in self.quantized else self.index.place(name)

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Read the part of a tensor inside `box` into `out`; see ReadableTensors.read_into.

        Reads the scales of the blocks that the box touches and no others. Memory beside `out` is
        about that of the box, in blocks of rows in float32.

        Raises:
            CheckpointError: also for a scale that is not a positive number.
        """
        if name not in self.quantized:
            self.index.read_into(name, box, out)
            return
        check_box(self._view[name], box)
        if not out.size:
            return
        stored = read_box(self.index, name, box)
        scales = self.read_scales(name, self.quantization.scale_box(box))
        dequantize(stored, scales, self.quantization, out, self.quantization.first(box))

    def read_scales(self, name: str, box: Box) -> Array:
        """Scales of a quantized weight, float32. Raises CheckpointError for an unusable one."""
        import numpy as np

        scales = read_box(self.index, name + SCALE_SUFFIX, box).astype(np.float32)
        unusable = ~(np.isfinite(scales) & (scales > 0))
        if unusable.any():
            raise CheckpointError(
                f"{self.index.folder}: {name + SCALE_SUFFIX} holds {int(unusable.sum())} scales "
                f"that are not positive numbers, such as {float(scales[unusable][0])}; the file is "
                f"damaged, or not quantized by block"
            )
        return scales

    def close(self) -> None:
        """Close the file handles; a later read opens them again."""
        self.index.close()


type Weights = TensorIndex | DequantizedTensors
"""What PreTrainedVLM.weights is: names, shapes and dtypes, and reading by box."""


def check_scales(weights: Weights) -> None:
    """Read all scales, so that no conversion meets an unusable one halfway.

    Memory is a few MiB.

    Raises:
        CheckpointError: for the first that is not a positive number.
    """
    if not isinstance(weights, DequantizedTensors):
        return
    for name, scales in weights.quantized.items():
        size = scales.shape[0]
        step = max(1, size * _CHECKED_BYTES // max(1, scales.nbytes))
        rest = full_box(scales.shape[1:])
        for start in range(0, size, step):
            weights.read_scales(name, ((start, min(start + step, size)), *rest))


def weights_of(index: TensorIndex, config: HFConfig) -> Weights:
    """The weights in files as the model that a conversion is about.

    Raises:
        UnsupportedModel: the quantization is not read.
        ConfigError: the config states an incomplete quantization, or one that the files do not
            have.
        CheckpointError: files and config do not agree.
    """
    quantization = quantization_of(config, index)
    if quantization is not None:
        return DequantizedTensors(index, quantization)
    check_tensors(index, None, str(index.folder))  # the config may be silent about it
    return index


def dequantize(
    stored: Array, scales: Array, block: BlockFP8, out: Array, first: tuple[int, int] = (0, 0)
) -> None:
    """Stored values times their scales, rounded to bfloat16.

    Memory beside `out` is one row of blocks in float32.

    Args:
        stored: [..., rows, columns], e4m3.
        scales: float32, of the blocks that the values lie in.
        block: the size of a block.
        out: bfloat16 of the shape of `stored`, with any strides.
        first: row and column of the first value inside of its block.
    """
    import numpy as np

    from megatron.bridge.tensors.arrays import copy

    columns = np.arange(first[1], first[1] + stored.shape[-1]) // block.columns
    for number, (start, stop) in enumerate(block_rows(stored.shape[-2], block, first[0])):
        values = e4m3_to_float(stored[..., start:stop, :])
        with np.errstate(over="ignore", invalid="ignore"):  # infinite and NaN as they come out
            values *= scales[..., number, None, :][..., columns]
            copy(values.astype(out.dtype), out[..., start:stop, :])


@cache
def _e4m3_values() -> Array:
    """The float32 value of each code."""
    import numpy as np

    return np.arange(256, dtype=np.uint8).view(numpy_dtype("F8_E4M3")).astype(np.float32)


def e4m3_to_float(stored: Array) -> Array:
    """The float32 values of e4m3 numbers: looked up, a quarter of the time of a conversion."""
    import numpy as np

    values: Array = _e4m3_values()[stored.view(np.uint8)]
    return values


def block_rows(rows: int, block: BlockFP8, first: int = 0) -> Iterator[tuple[int, int]]:
    """The rows (start, stop) of each row of blocks; the first row is row `first` of its block."""
    for edge in range(-first, rows, block.rows):
        yield max(0, edge), min(edge + block.rows, rows)
