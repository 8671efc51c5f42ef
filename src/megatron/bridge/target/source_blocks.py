"""Files of a target that consist of blocks of its sources as far as these can be shared.

Which bytes a target has does not depend on that; how they get there does, and what is known of
them: nobody has read a shared block, so no checksum is recorded of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron.bridge.engine.block_sharing import Segment, SharedRange, divided, share
from megatron.bridge.engine.piece_writer import Checksums
from megatron.bridge.engine.pieces import FileCopy, OutputFile, Piece
from megatron.bridge.engine.shared_blocks import why_not_shared
from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.weight_files import is_safetensors
from megatron.bridge.target.fingerprint import Fingerprint
from megatron.bridge.target.record import CheckedRange, FileRecord, RecordedRange, UnreadRange
from megatron.bridge.target.reflink import Reflink


@dataclass(frozen=True)
class DividedFile:
    """A file of a target, and what of it is shared.

    Attributes:
        file: as it is laid out.
        segments: all of it, in order.
        link: the file that it becomes another name of; it is one shared range then.
    """

    file: OutputFile
    segments: tuple[Segment, ...]
    link: Path | None = None

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
        hard_links: whether weights that are a whole file of a source become hard links to it.
    """

    def __init__(
        self,
        reflink: Reflink,
        target: Path,
        sources: Mapping[str, Fingerprint],
        *,
        hard_links: bool = False,
    ) -> None:
        self._reflink = reflink
        self._hard_links = hard_links
        self._beside = target.absolute().parent
        self._names = {
            source.folder / file.name: file.name
            for source in sources.values()
            if source.folder is not None
            for file in source.files
        }
        self._tried: dict[Path, bool] = {}

    def divide(self, file: OutputFile, piece_bytes: int) -> DividedFile:
        """See `divided`. Raises InputError where what is demanded cannot be done."""
        if self._hard_links and (copy := whole_copy(file)) and copy.path in self._names:
            self._check_link(copy.path)
            return DividedFile(file, (SharedRange(file.name, 0, copy),), copy.path)
        return DividedFile(file, tuple(divided(file, piece_bytes, self._shares)))

    def share(self, folder: Path, file: DividedFile, piece_bytes: int) -> DividedFile:
        """Make a file and what is shared of it.

        What an earlier run left of it is removed: it may be another name of a file of a source.

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
        (folder / file.name).unlink(missing_ok=True)
        if file.link is not None:
            self._link(file.link, folder / file.name)
            return file
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

    def _check_link(self, source: Path) -> None:
        """Refuse what `_link` would fail at, as far as that can be told before it."""
        try:
            same = source.stat().st_dev == _nearest(self._beside).stat().st_dev
        except OSError as error:
            raise self._no_link(source, error.strerror) from error
        if not same:
            raise self._no_link(source, os.strerror(errno.EXDEV))

    def _link(self, source: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), path)  # not another name of a link that leads there
        except OSError as error:
            raise self._no_link(source, error.strerror) from error

    def _no_link(self, source: Path, why: str | None) -> InputError:
        return InputError(
            f"--hard-links (hard_links): a target in {self._beside} cannot have another name of "
            f"{source}: {why}; leave the option out to copy"
        )

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


def whole_copy(file: OutputFile) -> FileCopy | None:
    """What a file of weights is a copy of, if it is that of a whole file."""
    position, last = 0, None
    for part in file.parts:
        if not isinstance(part, FileCopy) or part.offset != position:
            return None
        if last is not None and part.path != last.path:
            return None
        position, last = position + part.nbytes, part
    if last is None or not is_safetensors(file.name) or last.path.stat().st_size != position:
        return None
    return FileCopy(last.path, 0, position)


def _nearest(folder: Path) -> Path:
    """The folder, or that above it in which it will be made."""
    while not folder.is_dir():
        folder = folder.parent
    return folder
