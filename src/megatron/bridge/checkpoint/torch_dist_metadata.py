"""Reading `.metadata`, the pickle that indexes a torch_dist checkpoint, without running it.

A pickle can name any callable. This unpickler builds the few data classes that an index is made
of and refuses every other name, so a checkpoint from a stranger cannot run code.
"""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron.bridge.checkpoint.iterations import METADATA_FILE
from megatron.bridge.errors import CheckpointError

_ALLOWED = frozenset(
    [
        ("builtins", "set"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        *(("torch", name) for name in ("strided", "contiguous_format", "preserve_format")),
        *(
            ("torch", name)
            for name in (
                "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 "
                "float64 complex64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
                "float8_e8m0fnu"
            ).split()
        ),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
                "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"
            ).split()
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in "SavePlan TensorWriteData WriteItem WriteItemType".split()
        ),
    ]
)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The index of a torch_dist checkpoint.

    Raises CheckpointError if the file is missing, damaged or holds anything but an index.
    """
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a torch_dist checkpoint: no {METADATA_FILE}"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: refused to read it: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: not the index of a torch_dist checkpoint")
    return metadata
