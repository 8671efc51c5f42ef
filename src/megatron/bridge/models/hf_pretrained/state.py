"""The tensors of a model folder as a mapping that reads each when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.hf_pretrained.fp8 import Weights


class StateDict(Mapping[str, "torch.Tensor"]):
    """Like a model's `state_dict()`, in the order of the files; nothing is kept in memory."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole tensor, in the dtype of its file. Raises KeyError."""
        if name not in self._weights:
            raise KeyError(name)
        return self._weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
