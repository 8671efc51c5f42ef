"""A tensor without its data: what plans, headers and checkpoints say of one."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from megatron.bridge.dtypes import can_be_cast, itemsize, widest
from megatron.bridge.errors import CheckpointError
from megatron.bridge.tensors.boxes import Box, Shape


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its data.

    Attributes:
        name: in the files, or the key in a Megatron checkpoint.
        shape: its sizes.
        dtype: safetensors' name of its dtype ("BF16").
    """

    name: str
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def form(self) -> str:
        """Dtype and shape, as messages say them."""
        return f"{self.dtype} of shape {self.shape}"


def main_dtype(tensors: Iterable[TensorSpec]) -> str:
    """The dtype that most bytes have; there is at least one tensor."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def widened(tensors: Mapping[str, TensorSpec], dtype: str) -> dict[str, TensorSpec]:
    """The tensors in a dtype that holds their own and `dtype`, where there is one."""
    return {
        name: replace(spec, dtype=widest(spec.dtype, dtype) or spec.dtype)
        for name, spec in tensors.items()
    }


def differences(
    expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]
) -> Iterator[str]:
    """How the tensors of a checkpoint, by key, are not those that a plan needs, one by one."""
    for key, spec in expected.items():
        if key not in found:
            yield f"{key}: missing from the checkpoint ({spec.form})"
        elif found[key].shape != spec.shape or not can_be_cast(spec.dtype, found[key].dtype):
            yield f"{key}: expected {spec.form}, found {found[key].form}"
    for key, spec in found.items():
        if key not in expected:
            yield f"{key}: no row maps it ({spec.form})"


def check_box(tensor: TensorSpec, box: Box) -> None:
    """Raise CheckpointError for a box that sticks out of a tensor."""
    fits = len(box) == len(tensor.shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(box, tensor.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(f"{tensor.name}: box {box} does not fit into shape {tensor.shape}")
