"""Files of a target that consist of blocks of its sources as far as these can be shared.

Which bytes a target has does not depend on that; how they get there does, and what is known of
them: nobody has read a shared block, so no checksum is recorded of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron.bridge.engine.block_sharing import Segment, SharedRange, divided, share
from megatron.bridge.engine.piece_writer import Checksums
from megatron.bridge.engine.pieces import OutputFile, Piece
from megatron.bridge.engine.shared_blocks import why_not_shared
from megatron.bridge.errors import InputError
from megatron.bridge.target.fingerprint import Fingerprint
from megatron.bridge.target.record import CheckedRange, FileRecord, RecordedRange, UnreadRange
from megatron.bridge.target.reflink import Reflink


@dataclass(frozen=True)
class DividedFile:
    """A file of a target, and what of it is shared."""

    file: OutputFile
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        """Relative to the target."""
        return self.file.name

    @property
    def pieces(self) -> Iterator[Piece]:
        """What is written."""
        return (segment for segment in self.segments if isinstance(segment, Piece))

    @cached_property
    def ranges(self) -> Sequence[SharedRange]:
        """What is shared."""
        return [segment for segment in self.segments if isinstance(segment, SharedRange)]

    @property
    def shared_bytes(self) -> int:
        """How much is shared."""
        return sum(one.nbytes for one in self.ranges)

    @property
    def tensor_bytes(self) -> int:
        """How much of it is tensor data."""
        return sum(segment.tensor_bytes for segment in self.segments)


class SourceBlocks:
    """Shares blocks of the files that a conversion reads. Each file is tried once.

    Args:
        reflink: whether to.
        target: the folder that is to be made.
        sources: the files; others are copied, because nobody would notice that they change.
    """

    def __init__(self, reflink: Reflink, target: Path, sources: Mapping[str, Fingerprint]) -> None:
        self._reflink = reflink
        self._beside = target.absolute().parent
        self._names = {
            source.folder / file.name: file.name
            for source in sources.values()
            if source.folder is not None
            for file in source.files
        }
        self._tried: dict[Path, bool] = {}

    def divide(self, file: OutputFile, piece_bytes: int) -> DividedFile:
        """See `divided`. Raises InputError where sharing is demanded and cannot be done."""
        return DividedFile(file, tuple(divided(file, piece_bytes, self._shares)))

    def share(self, folder: Path, file: DividedFile, piece_bytes: int) -> DividedFile:
        """Make a file and what is shared of it.

        Args:
            folder: to make it in.
            file: divided.
            piece_bytes: of a piece.

        Returns:
            The file; what could not be shared after all are pieces in it.

        Raises:
            CheckpointError: see `engine.block_sharing.share`.
            InputError: sharing is demanded and cannot be done.
        """
        failed = set(share(folder, file.file, file.ranges)) if file.ranges else set()
        if not failed:
            return file
        if self._reflink == "always":
            path = next(iter(failed)).copy.path
            raise self._refusal(path, "the system does not share all of its blocks")
        segments: list[Segment] = []
        for segment in file.segments:
            if isinstance(segment, SharedRange) and segment in failed:
                segments += segment.pieces(piece_bytes)
            else:
                segments.append(segment)
        return replace(file, segments=tuple(segments))

    def record(self, file: DividedFile, checksums: Checksums = ()) -> FileRecord:
        """What is known of a file that is on the disk.

        Args:
            file: as it was written.
            checksums: of its pieces.
        """
        taken = iter(checksums)
        ranges: list[RecordedRange] = []
        for segment in file.segments:
            if isinstance(segment, SharedRange):
                copy = segment.copy
                ranges.append(UnreadRange(copy.nbytes, copy.offset, self._names[copy.path]))
            elif segment.nbytes:
                ranges.append(CheckedRange(*next(taken)))
        return FileRecord(file.name, tuple(ranges))

    def _shares(self, path: Path) -> bool:
        if self._reflink == "never" or path not in self._names:
            return False
        if path not in self._tried:
            self._tried[path] = self._try(path)
        return self._tried[path]

    def _try(self, path: Path) -> bool:
        try:
            why = why_not_shared(path, _nearest(self._beside))
        except OSError as error:
            why = error.strerror
        if why and self._reflink == "always":
            raise self._refusal(path, why)
        return not why

    def _refusal(self, path: Path, why: str) -> InputError:
        return InputError(
            f"--reflink always (reflink): a target in {self._beside} cannot share blocks with "
            f"{path} ({why}); put both on one file system that shares blocks, such as XFS or "
            f"btrfs, or give auto to copy"
        )


def _nearest(folder: Path) -> Path:
    """The folder, or that above it in which it will be made."""
    while not folder.is_dir():
        folder = folder.parent
    return folder
