"""How a conversion is carried out: memory, processes, resuming, checking. No tensor depends on it.

Only the split into files does, by `max_shard_bytes`, and into pieces, by a very small `memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.engine.piece_writer import Checksums
from megatron.bridge.engine.pieces import FillTensor, OutputFile, Piece, pieces_of
from megatron.bridge.engine.stream import DEFAULT_MEMORY, Budget, write_pieces
from megatron.bridge.errors import MismatchError
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.fingerprint import Fingerprint, check_unchanged
from megatron.bridge.target.folder import ResumableFolder
from megatron.bridge.target.job import Job, layout_digest
from megatron.bridge.target.processes import Processes
from megatron.bridge.target.record import FileRecord
from megatron.bridge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from megatron.bridge.tensors.source import Source

_SHOWN = 20


@dataclass(frozen=True)
class Conversion:
    """What is to be written, and what of.

    Attributes:
        command: what was asked for.
        options: all that decides what is written, as JSON values.
        sources: the files that are read, by what they are.
        files: of the target.
        fill: gives the tensors in them.
        tensors: those that `reopen` finds in the folder of the target.
        reopen: reads that.
        rows_multiple: tensors that `fill` only makes from such a multiple of rows on (see
            `row_blocks`).
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


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote.

    Attributes:
        bytes: written by this process.
        resumed_bytes: taken over from an earlier run, by all processes.
        verified: whether it was read back and found right.
    """

    bytes: int
    resumed_bytes: int
    verified: bool


@dataclass(frozen=True)
class Run:
    """Options of a conversion, and what carries it out.

    Attributes:
        memory: bytes that buffers of this process may take.
        max_shard_bytes: of tensor data per output file.
        force: replace a target.
        resume: go on with what an interrupted run left.
        verify: read back what was written, and compare it with what it should be.
        keep_manifest: leave the checksums of its files in a Hugging Face folder, too, where the
            reference has no such file; a Megatron checkpoint always has them.
        processes: that share the work, each running the same conversion.
        progress: is told of what is done.
    """

    memory: int = DEFAULT_MEMORY
    max_shard_bytes: int | None = None
    force: bool = False
    resume: bool = False
    verify: bool = False
    keep_manifest: bool = False
    processes: Processes = field(default_factory=Processes)
    progress: Progress = field(default_factory=Silent)

    @cached_property
    def budget(self) -> Budget:
        """What files are laid out for. Raises InputError if `memory` is too small."""
        return Budget.of(self.memory)

    def write(self, target: Path, conversion: Conversion) -> Written:
        """Write the files of a conversion into `target`, which appears when all are complete.

        Raises:
            SourceChanged: a source is not as it was in the beginning.
            MismatchError: what is read back is not right.
            BaseException: whatever ResumableFolder and `write_pieces` raise.
        """
        sizes = {file.name: file.nbytes for file in conversion.files}
        pieces = [p for file in conversion.files for p in pieces_of(file, self.budget.piece_bytes)]
        job = Job(conversion.command, conversion.options, conversion.sources, layout_digest(pieces))
        # Blocks of FP8 are not cut, so a piece may be longer than the budget has it.
        budget = Budget.of(self.memory, max((piece.nbytes for piece in pieces), default=0))
        own = set(self.processes.own_files(sizes))
        with ResumableFolder(
            target,
            job,
            sizes,
            processes=self.processes,
            resume=self.resume,
            force=self.force,
            keep_manifest=conversion.keep_manifest,
        ) as folder:
            todo = [p for p in pieces if p.file in own and p.file not in folder.finished]
            self._write(folder, conversion, todo, budget)
            folder.commit(lambda: self._check(folder.path, conversion))
        written = sum(piece.nbytes for piece in todo)
        return Written(written, folder.resumed_bytes, self.verify)

    def _write(
        self,
        folder: ResumableFolder,
        conversion: Conversion,
        todo: Sequence[Piece],
        budget: Budget,
    ) -> None:
        def on_file(name: str, checksums: Checksums) -> None:
            folder.add(FileRecord(name, checksums))

        self.progress.start(conversion.command, sum(piece.tensor_bytes for piece in todo))
        write_pieces(
            folder.path,
            conversion.files,
            todo,
            conversion.fill,
            budget,
            on_file=on_file,
            progress=self.progress,
            check=self.processes.check,
        )

    def _check(self, folder: Path, conversion: Conversion) -> None:
        if self.verify:
            self._compare(folder, conversion)
        for source in conversion.sources.values():
            check_unchanged(source)

    def _compare(self, folder: Path, conversion: Conversion) -> None:
        """Read all tensors back and compare their bits. Raises MismatchError."""
        from megatron.bridge.engine.comparison import compare_tensors

        found = compare_tensors(
            conversion.tensors,
            conversion.reopen(folder).read_into,
            conversion.fill,
            self.budget,
            self.progress,
            rows_multiple=conversion.rows_multiple,
        )
        wrong = [name for name, difference in found.items() if difference.elements]
        if wrong:
            names = "".join(f"\n  - {name}" for name in wrong[:_SHOWN])
            more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise MismatchError(
                f"{len(wrong)} tensors read back are not what was written; the disk or the memory "
                f"of this machine is not reliable{names}{more}"
            )
