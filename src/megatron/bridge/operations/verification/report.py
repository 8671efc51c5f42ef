"""What comparing two checkpoints found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.bridge.text.document import stated

type Format = Literal["huggingface", "megatron"]


@dataclass(frozen=True, slots=True)
class Files:
    """One of the checkpoints: what was given, and the format that it has."""

    source: str
    format: Format


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides.

    Attributes:
        what: what differs.
        a: dtype and shape on the first side, where these differ.
        b: dtype and shape on the second side, where these differ.
        elements: how many elements have other bits, where bits differ.
        of: how many elements there are then.
        max_abs_diff: their largest distance; infinite where a NaN or an infinity differs.
    """

    name: str
    what: Literal["shape", "dtype", "bits"]
    a: str | None = None
    b: str | None = None
    elements: int | None = None
    of: int | None = None
    max_abs_diff: float | None = None


@dataclass(frozen=True, slots=True)
class SideFileDifference:
    """A file beside the weights that differs: in content, or it is on one side only."""

    file: str
    what: Literal["content", "only in a", "only in b"]


@dataclass
class VerifyReport:
    """What comparing two checkpoints found.

    Attributes:
        compared: number of tensors that both sides have.
        equal: number of those of them that are equal.
        bytes: of the tensor data that were compared, on one side.
        padding_elements: elements of the Megatron side that stand for no Hugging Face element and
            were not compared.
        ignored: tensors of a Megatron checkpoint that are not weights (optimizer state), or not of
            the part that is compared.
        carried: Hugging Face tensors that no Megatron model has a place for, and why; they are no
            difference.
        side_files: for information; None unless both sides are Hugging Face folders.
        seconds: to find out.
    """

    a: Files
    b: Files
    compared: int = 0
    equal: int = 0
    bytes: int = 0
    different: list[TensorDifference] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    padding_elements: int = 0
    ignored: list[str] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)
    side_files: list[SideFileDifference] | None = None
    seconds: float = 0.0

    @stated
    def identical(self) -> bool:
        """Whether both sides hold the same tensors, all bits equal."""
        return not (self.different or self.only_in_a or self.only_in_b)


@dataclass(frozen=True, slots=True)
class FileDifference:
    """A range of a file that is not what was written, or the whole file.

    Attributes:
        offset: where the range begins.
        bytes: its length.
        problem: what was found.
        tensors: those with data in the range, as far as that can be told.
    """

    file: str
    offset: int
    bytes: int
    problem: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConvertedFrom(Files):
    """What a target was converted from, and how it is no longer that, file by file."""

    changes: list[str]


@dataclass(frozen=True)
class FastReport:
    """What comparing a target with its manifest found.

    Attributes:
        converted_from: None if the source was not looked at.
        files: how many the manifest records.
        bytes: of these files, headers included.
        seconds: to find out.
    """

    target: Files
    converted_from: ConvertedFrom | None
    files: int
    bytes: int
    different: list[FileDifference]
    seconds: float

    @property
    def source_changes(self) -> list[str]:
        """How the source differs from what was converted; nothing if it was not looked at."""
        return [] if self.converted_from is None else self.converted_from.changes

    @stated
    def identical(self) -> bool:
        """Whether every file is as it was written, and the source as it was read."""
        return not (self.different or self.source_changes)
