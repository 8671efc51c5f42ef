"""How a conversion is carried out: memory, processes, resuming, checking. No tensor depends on it.

Only the split into files does, by `max_shard_bytes`, and into pieces, by a very small `memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.engine.pieces import FillTensor, OutputFile, Piece, pieces_of
from megatron.bridge.engine.stream import DEFAULT_MEMORY, Budget, write_pieces
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.fingerprint import Fingerprint, check_unchanged
from megatron.bridge.target.job import Job, layout_digest
from megatron.bridge.target.partial import PartialFolder
from megatron.bridge.target.processes import Processes
from megatron.bridge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from megatron.bridge.tensors.source import Source


@dataclass(frozen=True)
class Conversion:
    """What is to be written, and what of.

    command, options: what was asked for; all that decides what is written, as JSON values.
    sources: the files that are read, by what they are. files: of the target. fill: gives the
    tensors in them. tensors: those that `reopen` finds in the folder of the target. rows_multiple:
    tensors that `fill` only makes from such a multiple of rows on (see `row_blocks`).
    keep_manifest: whether the target keeps the checksums of its files.
    """

    command: str
    options: Mapping[str, object]
    sources: Mapping[str, Fingerprint]
    files: Sequence[OutputFile]
    fill: FillTensor
    tensors: Iterable[TensorSpec]
    reopen: Callable[[Path], Source]
    rows_multiple: Mapping[str, int] = field(default_factory=dict)
    keep_manifest: bool = True


@dataclass(frozen=True)
class ReadBack:
    """Tensors that were written: as they are read back from the files, and as they should be."""

    tensors: Iterable[TensorSpec]
    found: FillTensor
    expected: FillTensor
    rows_multiple: Mapping[str, int]
    budget: Budget
    progress: Progress


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes that this process wrote, and those of all processes taken over from an earlier run.

    checked: whether it was read back and found right.
    """

    written_bytes: int
    resumed_bytes: int
    checked: bool


@dataclass(frozen=True)
class Run:
    """Options of a conversion, and what carries it out.

    memory: bytes that buffers of this process may take. max_shard_bytes: of tensor data per output
    file. force: replace a target. resume: go on with what a killed run left. check: looks at what
    was written before it becomes the target, and raises if it is not right. keep_manifest: leave
    the checksums of its files in a Hugging Face folder, too, where the reference has no such file;
    a Megatron checkpoint always has them. processes: that share the work, each running the same
    conversion.
    """

    memory: int = DEFAULT_MEMORY
    max_shard_bytes: int | None = None
    force: bool = False
    resume: bool = False
    check: Callable[[ReadBack], None] | None = None
    keep_manifest: bool = False
    processes: Processes = field(default_factory=Processes)
    progress: Progress = field(default_factory=Silent)

    @cached_property
    def budget(self) -> Budget:
        """What files are laid out for. Raises InputError if `memory` is too small."""
        return Budget.of(self.memory)

    def write(self, target: Path, conversion: Conversion) -> Written:
        """Write the files of a conversion into `target`, which appears when all are complete.

        Raises what PartialFolder and `write_pieces` raise, SourceChanged if a source is not as it
        was in the beginning, and what `check` raises.
        """
        sizes = {file.name: file.nbytes for file in conversion.files}
        pieces = [p for file in conversion.files for p in pieces_of(file, self.budget.piece_bytes)]
        # Blocks of FP8 are not cut, so a piece may be longer than the budget has it.
        budget = Budget.of(self.memory, max((piece.nbytes for piece in pieces), default=0))
        job = Job(conversion.command, conversion.options, conversion.sources, layout_digest(pieces))
        mine = set(self.processes.share(sizes))
        with PartialFolder(
            target,
            job,
            sizes,
            processes=self.processes,
            resume=self.resume,
            force=self.force,
            keep_manifest=conversion.keep_manifest,
            progress=self.progress,
        ) as partial:
            todo = [piece for piece in partial.unfinished(pieces) if piece.file in mine]
            self._write(partial, conversion, todo, budget)
            partial.commit(lambda: self._check(partial.path, conversion))
        written = sum(piece.nbytes for piece in todo)
        return Written(written, partial.resumed_bytes, self.check is not None)

    def _write(
        self, partial: PartialFolder, conversion: Conversion, todo: list[Piece], budget: Budget
    ) -> None:
        self.progress.start(conversion.command, sum(piece.tensor_bytes for piece in todo))
        write_pieces(
            partial.path,
            conversion.files,
            todo,
            conversion.fill,
            budget,
            record=partial.record,
            progress=self.progress,
        )

    def _check(self, folder: Path, conversion: Conversion) -> None:
        if self.check is not None:
            self.check(
                ReadBack(
                    conversion.tensors,
                    conversion.reopen(folder).read_into,
                    conversion.fill,
                    conversion.rows_multiple,
                    self.budget,
                    self.progress,
                )
            )
        for source in conversion.sources.values():
            check_unchanged(source)
