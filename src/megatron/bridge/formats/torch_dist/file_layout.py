"""The files of a torch_dist checkpoint, laid out before any of their data are there.

The names are those that megatron-core's dist_checkpointing.save gives: tensors under their
checkpoint key, objects under ShardedObject.unique_key, the common state as one more object. Where
each of them lies is in `.metadata`, PyTorch's own index, so what reads a distributed checkpoint of
PyTorch reads these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.engine.pieces import PIECE_BYTES, Literal, OutputFile, Part
from megatron.bridge.errors import InputError
from megatron.bridge.formats.iterations import METADATA_FILE
from megatron.bridge.formats.torch_dist.collection import without_collection
from megatron.bridge.formats.torch_dist.index_format import (
    BACKEND_FILE,
    TORCH_DIST,
    TORCH_DIST_SUFFIX,
    TORCH_DIST_VERSION,
)
from megatron.bridge.formats.torch_dist.metadata import StoredChunk
from megatron.bridge.formats.torch_dist.metadata_writer import metadata_bytes
from megatron.bridge.formats.torch_dist.saved_tensor import (
    MAX_FRAME_BYTES,
    SavedTensor,
    saved_object,
)
from megatron.bridge.tensors.boxes import Box, box_shape, row_blocks
from megatron.bridge.tensors.spec import TensorSpec

COMMON_STATE = "common_state/shard_0_1"
"""Where megatron-core keeps everything that is not sharded."""

_BACKEND = {"sharded_backend": TORCH_DIST, "sharded_backend_version": TORCH_DIST_VERSION}


def torch_dist_files(
    tensors: Mapping[str, TensorSpec],
    chunks: Iterable[tuple[str, Box]],
    *,
    max_file_bytes: int,
    piece_bytes: int = PIECE_BYTES,
    extra_states: Iterable[str] = (),
    iteration: int = 0,
    folder: str = "",
) -> tuple[OutputFile, ...]:
    """Lay out a torch_dist checkpoint; the same arguments give the same bytes.

    Args:
        tensors: global tensors by key.
        chunks: keys and boxes, which tile the tensors; each is stored in as many pieces as it takes
            for none to be longer than `piece_bytes`.
        max_file_bytes: files of data are longer only where this is less than two pieces.
        piece_bytes: of a stored piece, what lies around its data included.
        extra_states: names of objects without content.
        iteration: recorded in the common state, as Megatron's training loop does.
        folder: in which the files lie, with "/" between folders.

    Returns:
        The files, those of the index last.

    Raises:
        InputError: `piece_bytes` has no room for data.
        CheckpointError: a dtype is unknown.
    """
    with without_collection():
        objects = list(_objects(extra_states, iteration))
        stored = [*_saved_tensors(tensors, chunks, piece_bytes), *objects]
        files, places = _distributed(stored, max_file_bytes)
        metadata = metadata_bytes(tensors, [item.key for item in objects], places)
    prefix = f"{folder}/" if folder else ""
    return (
        *(OutputFile(prefix + name, parts) for name, parts in files.items()),
        OutputFile.of_bytes(prefix + BACKEND_FILE, json.dumps(_BACKEND).encode(), piece_bytes),
        OutputFile.of_bytes(prefix + METADATA_FILE, metadata, piece_bytes),
    )


class _Stored(NamedTuple):
    """What is stored under a key: a box of a tensor, or an object, whose box is ()."""

    key: str
    box: Box
    part: Part


def _saved_tensors(
    tensors: Mapping[str, TensorSpec], chunks: Iterable[tuple[str, Box]], piece_bytes: int
) -> Iterator[_Stored]:
    room = piece_bytes - MAX_FRAME_BYTES
    if room <= 0:
        raise InputError(
            f"pieces of {piece_bytes} bytes have no room for data; allow more than "
            f"{MAX_FRAME_BYTES}"
        )
    for key, box in chunks:
        dtype = tensors[key].dtype
        for block in row_blocks(box_shape(box), itemsize(dtype), room):
            moved = tuple(
                (zero + start, zero + stop)
                for (start, stop), (zero, _) in zip(block, box, strict=True)
            )
            yield _Stored(key, moved, SavedTensor(key, moved, dtype))


def _objects(extra_states: Iterable[str], iteration: int) -> Iterator[_Stored]:
    """megatron-core stores an object as a list of its shards."""
    empty = Literal(saved_object([None]))
    for name in extra_states:
        yield _Stored(name, (), empty)
    common = {"checkpoint_version": 3.0, "iteration": iteration}
    yield _Stored(COMMON_STATE, (), Literal(saved_object([common])))


def _distributed(
    stored: Sequence[_Stored], max_file_bytes: int
) -> tuple[dict[str, tuple[Part, ...]], list[StoredChunk]]:
    """Files that are filled evenly and in order, and where in them everything lies."""
    sizes = [item.part.nbytes for item in stored]
    total, longest = sum(sizes), max(sizes)
    # A file ends behind the part that fills its share, so it can be longer by almost that part.
    share = total if total <= max_file_bytes else max(max_file_bytes - longest, longest)
    count = -(-total // share)
    files: dict[str, list[Part]] = {}
    places: list[StoredChunk] = []
    position = begin = 0
    turn, name = -1, ""
    for item, nbytes in zip(stored, sizes, strict=True):
        if position * count // total != turn:
            turn, begin = position * count // total, position
            name = f"__0_{len(files)}{TORCH_DIST_SUFFIX}"
            files[name] = []
        files[name].append(item.part)
        places.append(StoredChunk(item.key, item.box, name, position - begin, nbytes))
        position += nbytes
    return {name: tuple(parts) for name, parts in files.items()}, places
