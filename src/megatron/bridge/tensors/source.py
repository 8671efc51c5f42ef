"""Named tensors that are read by box."""

from typing import TYPE_CHECKING, Protocol

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.tensors.boxes import Box, box_shape

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Named tensors that are read by box: files, a checkpoint, a live model."""

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") in which a tensor is read."""

    def read_into(self, name: str, box: Box, out: "torch.Tensor") -> None:
        """Fill `out`, a view of any strides of shape ``box_shape(box)`` and the tensor's dtype."""


def read_box(
    source: Source, name: str, box: Box, device: "torch.device | str" = "cpu"
) -> "torch.Tensor":
    """One box of a tensor in new memory, in the dtype in which it is read."""
    import torch

    tensor = torch.empty(box_shape(box), dtype=torch_dtype(source.dtype_of(name)), device=device)
    source.read_into(name, box, tensor)
    return tensor
