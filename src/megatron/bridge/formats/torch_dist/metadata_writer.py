"""Writing `.metadata`, the pickle that indexes a torch_dist checkpoint, without torch.

What PyTorch unpickles is named, not imported. Names and texts that come again are referred to by
number, as Python's own pickler does; every other object is written where it is needed, so that the
same index gives the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from megatron.bridge.dtypes import TORCH_NAME_OF
from megatron.bridge.formats.torch_dist.metadata import StoredChunk
from megatron.bridge.formats.torch_dist.metadata_classes import (
    CHUNK,
    CLASSES,
    INDEX,
    METADATA,
    OBJECT,
    PLACE,
    PROPERTIES,
    SIZE,
    TENSOR,
)
from megatron.bridge.formats.torch_dist.pickle_codes import integer, integers
from megatron.bridge.formats.torch_dist.plain_pickle import Name
from megatron.bridge.tensors.boxes import Shape, box_shape
from megatron.bridge.tensors.spec import TensorSpec

_VERSION = "1.0.0"
"""The version of the index, as PyTorch counts."""

_NONE = b"N"


def metadata_bytes(
    tensors: Mapping[str, TensorSpec], objects: Iterable[str], stored: Iterable[StoredChunk]
) -> bytes:
    """The index of a checkpoint, as PyTorch unpickles it and `read_metadata` reads it.

    Args:
        tensors: by key.
        objects: names of everything else.
        stored: where the boxes of tensors and the objects lie.
    """
    stored = list(stored)
    chunks: dict[str, list[StoredChunk]] = defaultdict(list)
    for chunk in stored:
        chunks[chunk.key].append(chunk)
    out = _Pickle()
    out.begin(METADATA)
    out.shared("state_dict_metadata").code(b"}(")
    for key, spec in tensors.items():
        out.shared(key)
        _tensor(out, spec, chunks[key])
    for key in objects:
        out.shared(key).shared(OBJECT).code(b")\x81")
    out.code(b"u").field("planner_data", _NONE)
    out.shared("storage_data").code(b"}(")
    for chunk in stored:
        _place(out, chunk, is_tensor=chunk.key in tensors)
    out.code(b"u").shared("storage_meta").begin(Name(CLASSES, "StorageMeta"))
    for name in ("checkpoint_id", "save_id", "load_id"):
        out.field(name, _NONE)
    out.field("modules", b"]").end()
    out.shared("version").shared(_VERSION).end()
    return out.finished()


def _tensor(out: _Pickle, spec: TensorSpec, chunks: Sequence[StoredChunk]) -> None:
    out.begin(TENSOR)
    out.shared("properties").shared(PROPERTIES).code(b")\x81(")
    out.shared(Name("torch", TORCH_NAME_OF[spec.dtype]))
    out.shared(Name("torch.serialization", "_get_layout")).shared("torch.strided").code(b"\x85R")
    # Neither requires a gradient nor is pinned, and no format of memory is stated.
    out.code(b"\x89").shared(Name(CLASSES, "_MEM_FORMAT_ENCODING")).code(b"K\0\x85R\x89tb")
    out.shared("size").size(spec.shape)
    out.shared("chunks").code(b"](")
    for chunk in chunks:
        out.begin(CHUNK).shared("offsets").size(tuple(start for start, _ in chunk.box))
        out.shared("sizes").size(box_shape(chunk.box)).end()
    out.code(b"e").end()


def _place(out: _Pickle, chunk: StoredChunk, *, is_tensor: bool) -> None:
    out.begin(INDEX).shared("fqn").shared(chunk.key).field("index", _NONE).shared("offset")
    if is_tensor:
        out.size(tuple(start for start, _ in chunk.box)).end()
    else:
        out.code(_NONE).end()
    out.begin(PLACE).shared("relative_path").shared(chunk.file)
    out.field("offset", integer(chunk.offset)).field("length", integer(chunk.length)).end()


def _short_or_long(short: bytes, long: bytes, number: int) -> bytes:
    """An operation with a number of one byte, or the one that takes four."""
    return short + bytes([number]) if number < 256 else long + number.to_bytes(4, "little")


class _Pickle:
    """A pickle of protocol 4 that grows."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._known: dict[str | Name, bytes] = {}

    def code(self, operations: bytes) -> _Pickle:
        self._content += operations
        return self

    def shared(self, value: str | Name) -> _Pickle:
        """A text or a name, which is written once."""
        known = self._known.get(value)
        if known is not None:
            self._content += known
            return self
        if isinstance(value, Name):
            self.shared(value.module).shared(value.name).code(b"\x93\x94")
        else:
            text = value.encode()
            self.code(_short_or_long(b"\x8c", b"X", len(text)) + text + b"\x94")
        self._known[value] = _short_or_long(b"h", b"j", len(self._known))
        return self

    def size(self, sizes: Shape) -> _Pickle:
        return self.shared(SIZE).code(integers(sizes) + b"\x85R")

    def begin(self, name: Name) -> _Pickle:
        """A new object, whose fields follow."""
        return self.shared(name).code(b")\x81}(")

    def field(self, name: str, value: bytes) -> _Pickle:
        return self.shared(name).code(value)

    def end(self) -> _Pickle:
        return self.code(b"ub")

    def finished(self) -> bytes:
        content = bytes(self._content) + b"."
        return b"\x80\x04\x95" + len(content).to_bytes(8, "little") + content
