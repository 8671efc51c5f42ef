"""What both formats have in common: how many tensors and bytes, in which dtypes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from megatron.bridge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """keys: number of tensors. bytes: of their data. dtypes: name -> (tensors, bytes)."""

    keys: int
    bytes: int
    dtypes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> Self:
        """Count tensors; dtypes are sorted by bytes, the largest first."""
        dtypes: dict[str, tuple[int, int]] = {}
        for tensor in tensors:
            count, size = dtypes.get(tensor.dtype, (0, 0))
            dtypes[tensor.dtype] = (count + 1, size + tensor.nbytes)
        ordered = dict(sorted(dtypes.items(), key=lambda item: -item[1][1]))
        return cls(
            sum(count for count, _ in ordered.values()),
            sum(size for _, size in ordered.values()),
            ordered,
        )


@dataclass(frozen=True, slots=True)
class FileSummary:
    """A file of weights: its tensors and the bytes of their data."""

    name: str
    keys: int
    bytes: int
