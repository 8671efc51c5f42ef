"""The safetensors files of a model as output files: header first, then every tensor in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron.bridge.checkpoint.pieces import OutputFile, Part, TensorData
from megatron.bridge.checkpoint.safetensors_writer import shard_header
from megatron.bridge.dtypes import itemsize
from megatron.bridge.models.conversion.boxes import row_blocks
from megatron.bridge.models.conversion.plan import TensorSpec


def shard_layout(
    file_name: str,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str] | None,
    piece_bytes: int,
    rows_multiple: Mapping[str, int] | None = None,
) -> OutputFile:
    """One file with the tensors of `specs` in this order, in parts of at most `piece_bytes`.

    metadata: of the header, left out if None. rows_multiple: tensors whose blocks must begin at
    such a multiple of rows, by name (see `row_blocks`).
    """
    header = shard_header(file_name, specs, metadata)
    head = OutputFile.of_bytes(file_name, header, piece_bytes)
    return OutputFile(file_name, (*head.parts, *_data(specs, piece_bytes, rows_multiple or {})))


def _data(
    specs: Sequence[TensorSpec], piece_bytes: int, multiples: Mapping[str, int]
) -> Iterator[Part]:
    for spec in specs:
        rows = multiples.get(spec.name, 1)
        for box in row_blocks(spec.shape, itemsize(spec.dtype), piece_bytes, rows):
            yield TensorData(spec.name, box, spec.dtype)
