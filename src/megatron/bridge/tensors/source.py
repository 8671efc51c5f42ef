"""Named tensors that are read by box."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from megatron.bridge.tensors.boxes import Box, box_shape

if TYPE_CHECKING:
    from megatron.bridge.tensors.arrays import Array


class Source(Protocol):
    """Named tensors that are read by box: files, a checkpoint, a live model."""

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") in which a tensor is read."""

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Fill `out`, a view of any strides of shape ``box_shape(box)`` and the tensor's dtype."""


def read_box(source: Source, name: str, box: Box) -> Array:
    """One box of a tensor in new memory, in the dtype in which it is read."""
    from megatron.bridge.tensors.arrays import empty

    array = empty(box_shape(box), source.dtype_of(name))
    source.read_into(name, box, array)
    return array
