"""What comparing two checkpoints found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

type Kind = Literal["huggingface", "megatron"]


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides.

    what: "shape", "dtype" or "bits". a, b: the shape or dtype on each side; for bits, empty.
    elements: how many of `of` elements have other bits. max_abs: their largest distance, infinite
    where a NaN or an infinity differs.
    """

    name: str
    what: Literal["shape", "dtype", "bits"]
    a: str = ""
    b: str = ""
    elements: int = 0
    of: int = 0
    max_abs: float = 0.0


@dataclass(frozen=True, slots=True)
class SideFileDifference:
    """A file beside the weights that differs: in content, or it is on one side only."""

    file: str
    what: Literal["content", "only in a", "only in b"]


@dataclass
class VerifyReport:
    """What comparing two checkpoints found.

    compared, equal: tensors. compared_bytes: of tensor data on one side. padding: elements of the
    Megatron side that stand for no Hugging Face element and were not compared. ignored: tensors
    of a Megatron checkpoint that are no weights (optimizer state), or not of the part that is
    compared. carried: Hugging Face tensors that no Megatron model has a place for, and why; they
    are no difference. side_files: for information, None unless both sides are Hugging Face folders.
    """

    a: str
    b: str
    a_kind: Kind
    b_kind: Kind
    compared: int = 0
    equal: int = 0
    compared_bytes: int = 0
    different: list[TensorDifference] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    padding: int = 0
    ignored: list[str] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)
    side_files: list[SideFileDifference] | None = None

    @property
    def identical(self) -> bool:
        """Whether both sides hold the same tensors, all bits equal."""
        return not (self.different or self.only_in_a or self.only_in_b)


@dataclass(frozen=True, slots=True)
class FileDifference:
    """A range of a file that is not what was written, or the whole file.

    offset, nbytes: of the range. problem: what was found. tensors: those with data in the range,
    as far as that can be told.
    """

    file: str
    offset: int
    nbytes: int
    problem: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class FastReport:
    """What comparing a target with its manifest found.

    files, nbytes: that the manifest records. source: None if it was not looked at.
    source_changes: how it differs from what was converted, file by file. seconds: to find out.
    """

    target: str
    target_kind: Kind
    source: str | None
    source_kind: Kind
    files: int
    nbytes: int
    different: list[FileDifference]
    source_changes: list[str]
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether every file is as it was written, and the source as it was read."""
        return not (self.different or self.source_changes)
