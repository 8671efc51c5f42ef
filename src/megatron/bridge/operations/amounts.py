"""How much there is: tensors, bytes and dtypes, as reports state them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from megatron.bridge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Amount:
    """How many tensors there are, and how large they are.

    Attributes:
        keys: number of tensors.
        bytes: of their data.
    """

    keys: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorSummary(Amount):
    """Tensors together, and by the name of their dtype."""

    dtypes: Mapping[str, Amount]

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> Self:
        """Count tensors; dtypes are sorted by bytes, the largest first."""
        sizes: dict[str, list[int]] = {}
        for tensor in tensors:
            sizes.setdefault(tensor.dtype, []).append(tensor.nbytes)
        dtypes = {dtype: Amount(len(found), sum(found)) for dtype, found in sizes.items()}
        return cls(
            sum(amount.keys for amount in dtypes.values()),
            sum(amount.bytes for amount in dtypes.values()),
            dict(sorted(dtypes.items(), key=lambda item: -item[1].bytes)),
        )


@dataclass(frozen=True, slots=True)
class FileSize:
    """A file, and its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Shard(Amount):
    """A file of weights: its tensors and the bytes of their data."""

    name: str
