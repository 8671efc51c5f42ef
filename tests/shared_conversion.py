"""One of several processes that share a conversion, in which something may go wrong.

python -m torch.distributed.run --nproc-per-node 2 shared_conversion.py HOME NAME
    takes part in a conversion to HOME/NAME; NAME is one of ACCIDENTS
`every_accident` has each in its own processes, without torchrun: HOME/<name>.<process>.json
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed  # noqa: F401  (once, before the processes are made)

from megatron.bridge.errors import BridgeError, CheckpointError, SourceChanged
from megatron.bridge.target import process_team, unfinished
from megatron.bridge.target.job import Job
from megatron.bridge.target.manifest import PieceKey
from megatron.bridge.target.partial import PartialFolder
from megatron.bridge.target.processes import Processes

SIZES = {"a": 90, "b": 70, "c": 50, "sub/d": 64, "e": 3}
PIECES = [
    PieceKey(name, offset, min(16, size - offset))
    for name, size in SIZES.items()
    for offset in range(0, size, 16)
]
JOB = Job("import", {"experts": None}, {}, "00ff", "1.2")
BEFORE = 2
"""Pieces that a process writes before something happens to it."""


def write(partial: PartialFolder, piece: PieceKey) -> None:
    path = partial.path / piece.file
    path.parent.mkdir(exist_ok=True)
    content = bytes((piece.offset + at) % 251 for at in range(piece.nbytes))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, SIZES[piece.file])
    os.pwrite(descriptor, content, piece.offset)
    os.close(descriptor)
    partial.record(piece, zlib.crc32(content))


def stay(partial: PartialFolder) -> None:
    """Write the same pieces again and again, until another process fails."""
    while True:
        write(partial, PIECES[0])
        time.sleep(0.01)


def convert(
    processes: Processes,
    target: Path,
    accident: Callable[[Processes, PartialFolder], None],
    *,
    resume: bool = False,
    job: Job = JOB,
) -> list[int]:
    """A whole conversion; bytes that were taken over, and written by this process."""
    mine = processes.share(SIZES)
    with PartialFolder(target, job, SIZES, processes=processes, resume=resume) as partial:
        todo = [piece for piece in partial.unfinished(PIECES) if piece.file in mine]
        for piece in todo[:BEFORE]:
            write(partial, piece)
        accident(processes, partial)
        for piece in todo[BEFORE:]:
            write(partial, piece)
        partial.commit()
    return [partial.resumed_bytes, sum(piece.nbytes for piece in todo)]


def nothing(_processes: Processes, _partial: PartialFolder) -> None: ...


def happens_to(rank: int, end: Callable[[], None]) -> Callable[[Processes, PartialFolder], None]:
    """Something ends one process; the others work on until they learn of it."""

    def accident(processes: Processes, partial: PartialFolder) -> None:
        if processes.rank == rank:
            end()
        stay(partial)

    return accident


def raising(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def settings(processes: Processes) -> object:
    def read() -> object:
        raise CheckpointError("config.json: the file is missing")

    return processes.first_does(read)


ACCIDENTS: dict[str, Callable[[Processes, Path], object]] = {
    "none": lambda processes, target: convert(processes, target, nothing),
    "two fail": lambda processes, target: convert(
        processes,
        target,
        lambda _, partial: (
            raising(CheckpointError(f"shard {processes.rank} cannot be read"))()
            if processes.rank
            else stay(partial)
        ),
    ),
    "resumed": lambda processes, target: convert(
        processes, target.with_name("two fail"), nothing, resume=True
    ),
    "the first fails": lambda processes, target: convert(
        processes, target, happens_to(0, raising(OSError(28, "No space left on device")))
    ),
    "source changed": lambda processes, target: convert(
        processes, target, happens_to(1, raising(SourceChanged("it changed")))
    ),
    "killed": lambda processes, target: convert(processes, target, happens_to(1, kill)),
    "the first is killed": lambda processes, target: convert(
        processes, target, happens_to(0, kill)
    ),
    "another job": lambda processes, target: convert(
        processes, target, nothing, job=replace(JOB, layout=f"{processes.rank // 2:04}")
    ),
    "before the start": lambda processes, target: settings(processes),
}


def take_part(home: Path, name: str) -> None:
    """Be one process, and write down how it ended."""
    outcome: dict[str, object] = {}
    try:
        with Processes.from_environment() as processes:
            told = processes.first_does(lambda: {"first": os.getpid()})
            outcome["first"] = told["first"]
            outcome["done"] = ACCIDENTS[name](processes, home / name)
    except (BridgeError, OSError) as error:
        outcome["error"] = type(error).__name__
        outcome["message"] = "\n".join([str(error), *getattr(error, "__notes__", ())])
        outcome["status"] = getattr(error, "exit_status", 2)
    rank = os.environ.get("RANK", "0")
    (home / f"{name}.{rank}.json").write_text(json.dumps(outcome))


def start(home: Path, name: str, size: int) -> None:
    """Let processes run an accident, and wait until they have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.environ["RANK"] = str(rank)
            take_part(home, name)
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)


def every_accident(home: Path) -> None:
    """To be called in a process of its own."""
    unfinished.WORTH_KEEPING = 1
    process_team._BEAT_SECONDS = 0.1
    process_team._MISSED_BEATS = 50
    for name in ACCIDENTS:
        start(home, name, 2 if name == "resumed" else 3)


if __name__ == "__main__":
    unfinished.WORTH_KEEPING = 1
    take_part(Path(sys.argv[1]), sys.argv[2])
