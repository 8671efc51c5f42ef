"""Hugging Face files that several ranks write at once, each of them its own boxes.

Every place in every file is known before a byte is written, so ranks need not wait for one another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.engine.piece_writer import write_all
from megatron.bridge.engine.pieces import PIECE_BYTES, FillTensor, OutputFile, TensorData
from megatron.bridge.engine.stream import Budget
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.errors import CheckpointError
from megatron.bridge.progress import Progress
from megatron.bridge.tensors.arrays import array_over
from megatron.bridge.tensors.boxes import Box, blocks_of, box_shape, volume
from megatron.bridge.tensors.runs import Runs
from megatron.bridge.tensors.spec import TensorSpec


class _Block(NamedTuple):
    """A part of a tensor, what makes it, and the file in which the tensor begins at `offset`."""

    descriptor: int
    offset: int
    spec: TensorSpec
    box: Box
    fill: FillTensor


class SharedFiles:
    """The files of one folder, as each rank sees them.

    Args:
        folder: is there, and all ranks see it.
        files: all of the folder.
        tensors: those in the files, by name.
    """

    def __init__(
        self, folder: Path, files: Sequence[OutputFile], tensors: Mapping[str, TensorSpec]
    ) -> None:
        self._folder, self._files, self._tensors = folder, files, tensors
        self._places = dict(_places(files))

    def make(self, fill: FillTensor, is_shared: Callable[[str], bool]) -> None:
        """Make all files as long as they will be, and write what one rank is to write.

        Args:
            fill: makes the tensors that are not shared.
            is_shared: whether a tensor, by its name, is left to `write`.

        Raises:
            CheckpointError: a file cannot be written.
        """
        with writing(self._folder):
            for file in self._files:
                path = self._folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb", buffering=0) as stream:
                    stream.truncate(file.nbytes)
                    offset = 0
                    for part in file.parts:
                        if not (isinstance(part, TensorData) and is_shared(part.name)):
                            content = bytearray(part.nbytes)
                            part.write_to(memoryview(content), fill)
                            write_all(stream.fileno(), memoryview(content), offset)
                        offset += part.nbytes

    def write(self, boxes: Iterable[tuple[str, Box, FillTensor]], progress: Progress) -> None:
        """Write boxes of tensors, and bring them to the disk.

        Args:
            boxes: (name, box, what makes a part of it); no two of them overlap on any rank.
            progress: told of the bytes that are written.

        Raises:
            CheckpointError: a file cannot be written.
        """
        descriptors: dict[str, int] = {}
        lock = threading.Lock()

        def blocks() -> Iterator[_Block]:
            for name, box, fill in boxes:
                (file, offset), spec = self._places[name], self._tensors[name]
                if file not in descriptors:
                    path = self._folder / file
                    descriptors[file] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                    opened.callback(os.close, descriptors[file])
                for block in blocks_of(box, itemsize(spec.dtype), PIECE_BYTES):
                    yield _Block(descriptors[file], offset, spec, block, fill)

        def work(own: Iterator[_Block]) -> None:
            memory = memoryview(bytearray(PIECE_BYTES))
            for block in own:
                width, runs = itemsize(block.spec.dtype), Runs(block.spec.shape, block.box)
                content = memory[: volume(block.box) * width]
                array = array_over(content, box_shape(block.box), block.spec.dtype)
                block.fill(block.spec.name, block.box, array)
                for start in runs.starts():
                    run, content = content[: runs.length * width], content[runs.length * width :]
                    write_all(block.descriptor, run, block.offset + start * width)
                with lock:
                    progress.advance(array.nbytes)

        with ExitStack() as opened, writing(self._folder):
            run_in_threads(blocks(), work, Budget.of().threads)
            for descriptor in descriptors.values():
                os.fsync(descriptor)


def _places(files: Sequence[OutputFile]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Of each tensor its file, and where in it the first byte lies."""
    for file in files:
        offset, known = 0, ""
        for part in file.parts:
            if isinstance(part, TensorData) and part.name != known:
                known = part.name
                yield known, (file.name, offset)
            offset += part.nbytes


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into CheckpointError; `path` is named where they name none."""
    try:
        yield
    except OSError as error:
        culprit = error.filename or path
        raise CheckpointError(f"{culprit}: cannot be written ({error.strerror})") from error
