"""The safetensors files of a model as output files: header first, then every tensor in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.bridge.engine.pieces import OutputFile, tensor_blocks
from megatron.bridge.formats.safetensors_writer import shard_header
from megatron.bridge.tensors.spec import TensorSpec


def shard_layout(
    file_name: str,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str] | None,
    piece_bytes: int,
    rows_multiple: Mapping[str, int] | None = None,
) -> OutputFile:
    """One file with the tensors of `specs` in this order.

    Args:
        file_name: of the file.
        specs: its tensors.
        metadata: of the header; None leaves the entry out.
        piece_bytes: of a part of the file; `row_blocks` says which may be longer.
        rows_multiple: tensors whose blocks must begin at such a multiple of rows, by name (see
            `row_blocks`).
    """
    header = shard_header(file_name, specs, metadata)
    head = OutputFile.of_bytes(file_name, header, piece_bytes)
    data = tensor_blocks(specs, piece_bytes, rows_multiple or {})
    return OutputFile(file_name, (*head.parts, *data))
