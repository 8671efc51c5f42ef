"""Writing a torch_dist checkpoint from tensors that are made one at a time.

PyTorch's FileSystemWriter asks its planner for each tensor's data only when it is that tensor's
turn to be written, so a planner that makes tensors on demand streams a checkpoint of any size.
The names are those that megatron-core's dist_checkpointing.save gives: tensors under their
checkpoint key, objects under ShardedObject.unique_key, the common state as one more object.
"""

import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.conversion.boxes import Box, box_shape
from megatron.bridge.models.conversion.plan import TensorSpec

COMMON_STATE = "common_state/shard_0_1"
"""Where megatron-core keeps everything that is not sharded."""

_ZIP_WRITER = "inline_container"
"""The part of torch whose RuntimeError means that a write failed."""

_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    chunks: Iterable[tuple[str, Box]],
    read: Callable[[str, Box], torch.Tensor],
    *,
    extra_states: Iterable[str] = (),
    iteration: int = 0,
) -> None:
    """Write a torch_dist checkpoint into an existing, empty folder.

    Raises what `read` raises, or CheckpointError if the folder cannot be written.

    tensors: global tensors by key. chunks: boxes that tile them, each stored as one piece and
    asked of `read` when it is its turn. extra_states: names of objects without content.
    iteration: recorded in the common state, as Megatron's training loop does.
    """
    objects: dict[str, Any] = dict.fromkeys(extra_states)
    objects[COMMON_STATE] = {"checkpoint_version": 3.0, "iteration": iteration}
    try:
        with warnings.catch_warnings():
            # One process is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                {},
                storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True),
                planner=_StreamingPlanner(tensors, chunks, read, objects),
                no_dist=True,
            )
    except CheckpointException as error:
        # It wraps whatever went wrong, by rank; there is one rank.
        cause, _ = error.failures[0]
        if isinstance(cause, OSError):
            raise CheckpointError(f"{folder}: cannot be written: {cause.strerror}") from cause
        if isinstance(cause, RuntimeError) and _ZIP_WRITER in str(cause):
            # torch.save loses the error of the system: a full disk, a file size limit.
            raise CheckpointError(f"{folder}: cannot be written; is the disk full?") from cause
        raise cause from None
    (folder / "metadata.json").write_text(json.dumps(_BACKEND))


class _StreamingPlanner(SavePlanner):
    """One write item per chunk and per object; data is made in `resolve_data`."""

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        chunks: Iterable[tuple[str, Box]],
        read: Callable[[str, Box], torch.Tensor],
        objects: Mapping[str, Any],
    ) -> None:
        self._read = read
        self._objects = objects
        self._properties = {
            key: TensorProperties(dtype=torch_dtype(spec.dtype)) for key, spec in tensors.items()
        }
        self._sizes = {key: torch.Size(spec.shape) for key, spec in tensors.items()}
        self._boxes: dict[MetadataIndex, tuple[str, Box]] = {
            MetadataIndex(key, [start for start, _ in box]): (key, box) for key, box in chunks
        }

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing to set up: what is written is known already."""

    def create_local_plan(self) -> SavePlan:
        """All tensors, then all objects."""
        items = [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(box), self._properties[key], self._sizes[key]),
            )
            for index, (key, box) in self._boxes.items()
        ]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The index of the checkpoint."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in self._sizes}
        for key, box in self._boxes.values():
            chunks[key].append(_chunk(box))
        index: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            key: TensorStorageMetadata(self._properties[key], size, chunks[key])
            for key, size in self._sizes.items()
        }
        index |= {name: BytesStorageMetadata() for name in self._objects}
        return all_plans, Metadata(index)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """There is one process: its plan is the plan."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The content of one item; megatron-core stores objects as lists of shards."""
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], buffer)
            return buffer
        return self._read(*self._boxes[write_item.index])


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(
        offsets=torch.Size([start for start, _ in box]), sizes=torch.Size(box_shape(box))
    )
