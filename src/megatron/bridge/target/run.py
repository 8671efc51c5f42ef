"""How a conversion is carried out: memory, processes, resuming, checking. No tensor depends on it.

Only the split into files does, by `max_shard_bytes`, and into pieces, by a very small `memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.engine import DEFAULT_MEMORY
from megatron.bridge.engine.piece_writer import Checksums
from megatron.bridge.engine.pieces import FillTensor, OutputFile, pieces_of
from megatron.bridge.engine.stream import Budget, write_pieces
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.errors import MismatchError
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.checksums import with_checksums
from megatron.bridge.target.fingerprint import Fingerprint, check_unchanged
from megatron.bridge.target.folder import ResumableFolder
from megatron.bridge.target.folder_sync import sync
from megatron.bridge.target.job import Job, layout_digest
from megatron.bridge.target.processes import Processes
from megatron.bridge.target.record import read_records
from megatron.bridge.target.reflink import Reflink
from megatron.bridge.target.source_blocks import DividedFile, SourceBlocks
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
        all_checksums: whether it then keeps those of blocks that it shares with a source, too,
            which have to be read for that.
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
    all_checksums: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote.

    Attributes:
        bytes: of files that this process made.
        shared_bytes: how many of these lie in blocks that are those of a source.
        resumed_bytes: taken over from an earlier run, by all processes.
        verified: whether it was read back and found right.
    """

    bytes: int
    shared_bytes: int
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
        reflink: whether the target shares blocks with its sources.
        hard_links: whether weights that are a whole file of a source become hard links to it.
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
    reflink: Reflink = "auto"
    hard_links: bool = False
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
        blocks = SourceBlocks(self.reflink, target, conversion.sources, hard_links=self.hard_links)
        files = [blocks.divide(file, self.budget.piece_bytes) for file in conversion.files]
        own = set(self.processes.own_files(sizes))
        with ResumableFolder(
            target,
            job,
            sizes,
            shared={file.name: file.shared_bytes for file in files},
            processes=self.processes,
            resume=self.resume,
            force=self.force,
            keep_manifest=conversion.keep_manifest,
        ) as folder:
            todo = [f for f in files if f.name in own and f.name not in folder.finished]
            done = self._write(folder, conversion, todo, blocks, budget)
            if conversion.all_checksums:
                self._take_checksums(folder, own, budget)
            folder.commit(lambda: self._check(folder.path, conversion))
        return Written(
            sum(file.file.nbytes for file in done),
            sum(file.shared_bytes for file in done),
            folder.resumed_bytes,
            self.verify,
        )

    def _write(
        self,
        folder: ResumableFolder,
        conversion: Conversion,
        todo: Sequence[DividedFile],
        blocks: SourceBlocks,
        budget: Budget,
    ) -> list[DividedFile]:
        """Write files; returns them as they were written, some shared less than they could be."""
        self.progress.start(conversion.command, sum(file.tensor_bytes for file in todo))
        done: dict[str, DividedFile] = {}

        def share(own: Iterator[DividedFile]) -> None:
            for file in own:
                self.processes.check()
                done[file.name] = blocks.share(folder.path, file, self.budget.piece_bytes)

        run_in_threads(todo, share, budget.threads)
        files = [done[file.name] for file in todo]
        for file in (file for file in files if file.ranges):
            self.progress.advance(sum(one.tensor_bytes for one in file.ranges))
            if not any(file.pieces):
                sync(folder.path / file.name)
                folder.add(blocks.record(file))

        def on_file(name: str, checksums: Checksums) -> None:
            folder.add(blocks.record(done[name], checksums))

        write_pieces(
            folder.path,
            conversion.files,
            [piece for file in files for piece in file.pieces],
            conversion.fill,
            budget,
            on_file=on_file,
            progress=self.progress,
            check=self.processes.check,
        )
        return files

    def _take_checksums(
        self, folder: ResumableFolder, own: Collection[str], budget: Budget
    ) -> None:
        """Of all own files, those of earlier runs included."""
        recorded = {file.name: file for one in read_records(folder.path) for file in one.files}
        unread = [file for file in recorded.values() if file.name in own and file.unread_bytes]
        for file in with_checksums(folder.path, unread, self.progress, budget.threads):
            folder.add(file)

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
