"""A Hugging Face folder laid out like a reference: weights, weight index, side files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.engine.pieces import PIECE_BYTES, OutputFile
from megatron.bridge.formats.safetensors_layout import shard_layout
from megatron.bridge.formats.safetensors_writer import index_text, split_into_shards
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE
from megatron.bridge.tensors.spec import TensorSpec

MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of tensor data per file where no reference says how to split, as on the Hub."""


@dataclass(frozen=True, slots=True)
class _Shards:
    """The tensors of each file in the order of their data, header metadata, the weight index."""

    files: Mapping[str, Sequence[TensorSpec]]
    metadata: Mapping[str, Mapping[str, str] | None]
    index: bytes | None


def weight_files(
    tensors: Mapping[str, TensorSpec],
    reference: PreTrainedVLM,
    *,
    max_shard_bytes: int | None = None,
    piece_bytes: int = PIECE_BYTES,
    rows_multiple: Mapping[str, int] | None = None,
) -> Iterator[OutputFile]:
    """The safetensors files, and the weight index where there is more than one.

    A reference whose files hold the same tensors decides files, order, header metadata and index,
    so that equal tensors give equal files. Otherwise, or if `max_shard_bytes` is given, files are
    filled up to so many bytes of tensor data.

    Args:
        tensors: what the files hold, by name.
        reference: the model that they are laid out like.
        max_shard_bytes: of tensor data per file; MAX_SHARD_BYTES where nothing else decides.
        piece_bytes: see `shard_layout`.
        rows_multiple: see `shard_layout`.
    """
    shards = _shards(tensors, reference, max_shard_bytes)
    for file_name, specs in shards.files.items():
        metadata = shards.metadata[file_name]
        yield shard_layout(file_name, specs, metadata, piece_bytes, rows_multiple)
    if shards.index is not None:
        yield OutputFile.of_bytes(INDEX_FILE, shards.index, piece_bytes)


def _shards(
    tensors: Mapping[str, TensorSpec], reference: PreTrainedVLM, max_shard_bytes: int | None
) -> _Shards:
    size = sum(spec.nbytes for spec in tensors.values())
    alike = reference.has_weights and set(reference.tensors) == set(tensors)
    if max_shard_bytes is not None or not alike:
        files = split_into_shards(tensors.values(), max_shard_bytes or MAX_SHARD_BYTES)
        index = _index(files, size) if len(files) > 1 else None
        return _Shards(files, {key: {"format": "pt"} for key in files}, index)
    known = reference.tensors
    return _Shards(
        {shard.file_name: [tensors[name] for name in shard.names] for shard in known.shards},
        {shard.file_name: shard.metadata for shard in known.shards},
        _index_like(reference, size),
    )


def _index(files: Mapping[str, Sequence[TensorSpec]], size: int) -> bytes:
    weight_map = {spec.name: file_name for file_name, specs in files.items() for spec in specs}
    return index_text(weight_map, size).encode()


def _index_like(reference: PreTrainedVLM, size: int) -> bytes | None:
    known = reference.tensors
    if known.index_metadata is None:
        return None
    if size == known.total_bytes:
        # The same names lie in the same files, so the index is the reference's own.
        return (known.folder / INDEX_FILE).read_bytes()
    weight_map = {name: shard.file_name for shard in known.shards for name in shard.names}
    return index_text(weight_map, size, known.index_metadata).encode()


def side_file_copies(
    reference: PreTrainedVLM, *, quantized: bool = False, dtype: str | None = None
) -> Iterator[OutputFile]:
    """Config, tokenizer, processor, chat template and whatever else is not weights.

    A reference that is only a config is written as config.json. What was set on the reference's
    `config` is in it.

    Args:
        reference: whose files they are.
        quantized: whether the weights beside them are; if not, config.json does not say so either.
        dtype: of most of the weights ("BF16"), if it is not the reference's; then config.json
            states it.
    """
    config = reference.restated_config(quantized=quantized, dtype=dtype)
    if config is not None:
        yield OutputFile.of_bytes(CONFIG_FILE, config)
    for file in reference.side_files:
        if config is None or file != Path(CONFIG_FILE):
            yield OutputFile.copy_of(file.as_posix(), reference.folder / file)
