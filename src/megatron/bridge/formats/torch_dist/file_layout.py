"""The files of a torch_dist checkpoint, laid out before any of their data are there.

The names are those that megatron-core's dist_checkpointing.save gives: tensors under their
checkpoint key, objects under ShardedObject.unique_key, the common state as one more object. Where
each of them lies is in `.metadata`, PyTorch's own index, so what reads a distributed checkpoint of
PyTorch reads these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.engine.block_sharing import TensorRange
from megatron.bridge.engine.pieces import PIECE_BYTES, Literal, OutputFile, Part
from megatron.bridge.engine.shared_blocks import BLOCK_BYTES
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
    SavedHead,
    SavedTail,
    SavedTensor,
    saved_object,
)
from megatron.bridge.models.conversion.unchanged import Chunk, DataRange
from megatron.bridge.tensors.boxes import Box, blocks_of, box_shape, volume
from megatron.bridge.tensors.spec import TensorSpec

COMMON_STATE = "common_state/shard_0_1"
"""Where megatron-core keeps everything that is not sharded."""

_BACKEND = {"sharded_backend": TORCH_DIST, "sharded_backend_version": TORCH_DIST_VERSION}


def torch_dist_files(
    tensors: Mapping[str, TensorSpec],
    chunks: Sequence[Iterable[Chunk | tuple[str, Box]]],
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
        chunks: boxes that tile the tensors, by writer, each of which has files of its own; the
            first one has the objects, too. A box is stored in as many pieces as it takes for none
            to be longer than `piece_bytes`. Data that are a range of another file lie in a block
            of the file as they lie in one there, so that blocks can be shared.
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
        stored = [[*_saved_tensors(tensors, own, piece_bytes)] for own in chunks]
        stored[0] += objects
        files, places = _distributed(stored, max_file_bytes)
        metadata = metadata_bytes(tensors, [item.key for item in objects], places)
    prefix = f"{folder}/" if folder else ""
    return (
        *(OutputFile(prefix + name, parts) for name, parts in files.items()),
        OutputFile.of_bytes(prefix + BACKEND_FILE, json.dumps(_BACKEND).encode(), piece_bytes),
        OutputFile.of_bytes(prefix + METADATA_FILE, metadata, piece_bytes),
    )


class _Stored(NamedTuple):
    """What is stored under a key: a box of a tensor, or an object, whose box is ().

    Attributes:
        part: all of it, or its data where these are a range of another file.
        frame: of such data.
    """

    key: str
    box: Box
    part: Part
    frame: tuple[SavedHead, SavedTail] | None = None

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.part.nbytes + sum(part.nbytes for part in self.frame or ())

    def parts_at(self, position: int) -> tuple[int, tuple[Part, ...]]:
        """Where it begins in a file that is filled up to a position; the parts from there on."""
        if self.frame is None or not isinstance(self.part, TensorRange):
            return position, (self.part,)
        head, tail = self.frame
        gap = (self.part.offset - position - head.nbytes) % BLOCK_BYTES
        return position + gap, (replace(head, gap=gap), self.part, tail)


def _saved_tensors(
    tensors: Mapping[str, TensorSpec],
    chunks: Iterable[Chunk | tuple[str, Box]],
    piece_bytes: int,
) -> Iterator[_Stored]:
    room = piece_bytes - MAX_FRAME_BYTES
    if room <= 0:
        raise InputError(
            f"pieces of {piece_bytes} bytes have no room for data; allow more than "
            f"{MAX_FRAME_BYTES}"
        )
    for key, box, data in (Chunk(*chunk) for chunk in chunks):
        dtype = tensors[key].dtype
        if data is not None and room > BLOCK_BYTES:
            yield from _ranges(key, box, data, dtype, room - BLOCK_BYTES)
            continue
        for block in blocks_of(box, itemsize(dtype), room):
            yield _Stored(key, block, SavedTensor(key, block, dtype))


def _ranges(key: str, box: Box, data: DataRange, dtype: str, room: int) -> Iterator[_Stored]:
    """Pieces of a box whose data are a range of another file, in the order of that range."""
    offset = data.offset
    for turned in blocks_of(_turned(box, data), itemsize(dtype), room):
        block = _turned(turned, data)
        nbytes = volume(block) * itemsize(dtype)
        form = dtype, box_shape(block), data.transposed
        yield _Stored(
            key,
            block,
            TensorRange(data.path, offset, nbytes, key, block, dtype, data.transposed),
            (SavedHead(0, *form), SavedTail(*form)),
        )
        offset += nbytes


def _turned(box: Box, data: DataRange) -> Box:
    """A box with its axes in the order of the data, or back."""
    return (*box[:-2], box[-1], box[-2]) if data.transposed else box


def _objects(extra_states: Iterable[str], iteration: int) -> Iterator[_Stored]:
    """megatron-core stores an object as a list of its shards."""
    empty = Literal(saved_object([None]))
    for name in extra_states:
        yield _Stored(name, (), empty)
    common = {"checkpoint_version": 3.0, "iteration": iteration}
    yield _Stored(COMMON_STATE, (), Literal(saved_object([common])))


def writer_of(name: str) -> int:
    """Which writer has a file of a checkpoint: a place in `chunks` of `torch_dist_files`."""
    data = re.fullmatch(rf"__(\d+)_\d+{re.escape(TORCH_DIST_SUFFIX)}", name.rpartition("/")[2])
    return int(data[1]) if data else 0


def _distributed(
    stored: Sequence[Sequence[_Stored]], max_file_bytes: int
) -> tuple[dict[str, tuple[Part, ...]], list[StoredChunk]]:
    """Files of each writer, and where in them everything lies."""
    files: dict[str, tuple[Part, ...]] = {}
    places: list[StoredChunk] = []
    for writer, own in enumerate(stored):
        if own:
            files |= _filled_evenly(own, writer, max_file_bytes, places)
    return files, places


def _filled_evenly(
    stored: Sequence[_Stored], writer: int, max_file_bytes: int, places: list[StoredChunk]
) -> dict[str, tuple[Part, ...]]:
    """Files that are filled evenly and in order; `places` gets where everything lies."""
    # Gaps depend on where a file begins; here all are as long as they can be.
    sizes = [item.nbytes + (BLOCK_BYTES if item.frame else 0) for item in stored]
    total, longest = sum(sizes), max(sizes)
    # A file ends behind the part that fills its share, so it can be longer by almost that part.
    share = total if total <= max_file_bytes else max(max_file_bytes - longest, longest)
    count = -(-total // share)
    files: dict[str, list[Part]] = {}
    position = filled = 0
    turn, name = -1, ""
    for item, size in zip(stored, sizes, strict=True):
        if position * count // total != turn:
            turn, filled = position * count // total, 0
            name = f"__{writer}_{len(files)}{TORCH_DIST_SUFFIX}"
            files[name] = []
        begin, parts = item.parts_at(filled)
        files[name] += parts
        places.append(StoredChunk(item.key, item.box, name, begin, item.nbytes))
        position, filled = position + size, begin + item.nbytes
    return {name: tuple(parts) for name, parts in files.items()}
