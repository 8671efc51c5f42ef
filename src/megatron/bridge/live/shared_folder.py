"""A Hugging Face folder that several ranks write at once, each of them its own boxes.

Every place in every file is known before a byte is written, so ranks need not wait for one another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from megatron.bridge.dtypes import itemsize
from megatron.bridge.engine.piece_writer import write_all
from megatron.bridge.engine.pieces import PIECE_BYTES, FillTensor, OutputFile, TensorData
from megatron.bridge.engine.stream import Budget
from megatron.bridge.engine.worker_threads import run_in_threads
from megatron.bridge.errors import CheckpointError, InputError, TargetExists
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.target.folder_sync import sync, sync_all
from megatron.bridge.tensors.arrays import array_over
from megatron.bridge.tensors.boxes import Box, blocks_of, box_shape, volume
from megatron.bridge.tensors.runs import Runs
from megatron.bridge.tensors.spec import TensorSpec

_STAGED = ".hugging-face.partial"


class _Block(NamedTuple):
    """A part of a tensor, what makes it, and the file in which the tensor begins at `offset`."""

    descriptor: int
    offset: int
    spec: TensorSpec
    box: Box
    fill: FillTensor


class SharedFolder:
    """One folder, as each rank sees it."""

    def __init__(
        self,
        target: Path,
        files: Sequence[OutputFile],
        tensors: Mapping[str, TensorSpec],
        run: str,
    ) -> None:
        """`files` are all of the folder; `tensors` those in them, by name; `run` is no other's."""
        self._target, self._staged = target, target / f"{_STAGED}-{run}"
        self._files, self._tensors = files, tensors
        self._places = dict(_places(files))

    def make(self, fill: FillTensor, is_shared: Callable[[str], bool]) -> None:
        """Make all files as long as they will be, and write what one rank is to write.

        Args:
            fill: makes the tensors that are not shared.
            is_shared: whether a tensor, by its name, is left to `write`.

        Raises:
            TargetExists: the folder is not empty.
            CheckpointError: a file cannot be written.
        """
        with _writing(self._staged):
            _check_empty(self._target)
            self._staged.mkdir()
            for file in self._files:
                path = self._staged / file.name
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

    def write(self, boxes: Iterable[tuple[str, Box, FillTensor]]) -> None:
        """Write boxes of tensors, and bring them to the disk.

        Args:
            boxes: (name, box, what makes a part of it); no two of them overlap on any rank.

        Raises:
            InputError: this process does not see the folder.
            CheckpointError: a file cannot be written.
        """
        if not self._staged.is_dir():
            raise InputError(f"{self._target}: not every rank sees it; choose a shared folder")
        descriptors: dict[str, int] = {}

        def blocks() -> Iterator[_Block]:
            for name, box, fill in boxes:
                (file, offset), spec = self._places[name], self._tensors[name]
                if file not in descriptors:
                    path = self._staged / file
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

        with ExitStack() as opened, _writing(self._target):
            run_in_threads(blocks(), work, Budget.of().threads)
            for descriptor in descriptors.values():
                os.fsync(descriptor)

    def publish(self) -> None:
        """Put every file in its place, config.json last. Raises CheckpointError."""
        with _writing(self._target):
            tree = [(Path(folder), names) for folder, _, names in os.walk(self._staged)]
            sync_all(path for at, names in tree for path in (at, *map(at.joinpath, names)))
            for path in sorted(self._staged.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                path.rename(self._target / path.name)
            self._staged.rmdir()
            sync(self._target)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._staged, ignore_errors=True)


def _check_empty(target: Path) -> None:
    """Refuse a folder with anything in it but what a killed process left of this."""
    if not target.is_dir():
        raise InputError(f"{target}: there is no such folder; make it first")
    for path in sorted(target.iterdir()):
        if not path.name.startswith(_STAGED) or path.is_symlink() or not path.is_dir():
            raise TargetExists(f"{target} is not empty: it holds {path.name}; give an empty folder")
    for path in target.iterdir():
        shutil.rmtree(path)


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
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        culprit = error.filename or path
        raise CheckpointError(f"{culprit}: cannot be written ({error.strerror})") from error
