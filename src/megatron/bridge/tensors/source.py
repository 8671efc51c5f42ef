"""Named tensors that are read by box."""

from typing import TYPE_CHECKING, Protocol

from megatron.bridge.tensors.boxes import Box

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Named tensors that are read by box: files, a checkpoint, a live model."""

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") in which a tensor is read."""

    def read_into(self, name: str, box: Box, out: "torch.Tensor") -> None:
        """Fill `out`, a view of any strides of shape ``box_shape(box)`` and the tensor's dtype."""
