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
from megatron.bridge.target import folder as target_folder
from megatron.bridge.target.folder import ResumableFolder
from megatron.bridge.target.job import Job
from megatron.bridge.target.processes import Processes
from megatron.bridge.target.record import FileRecord

SIZES = {"a": 90, "b": 70, "c": 50, "sub/d": 64, "e": 83, "f": 77, "g": 3}
JOB = Job("import", {"experts": None}, {}, "00ff", "1.2")
BEFORE = 1
"""Files that a process writes before something happens to it."""


def write(folder: ResumableFolder, name: str) -> None:
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    content = bytes(at % 251 for at in range(SIZES[name]))
    path.write_bytes(content)
    folder.add(FileRecord(name, ((len(content), zlib.crc32(content)),)))


def stay(processes: Processes) -> None:
    """Work on until another process fails."""
    while True:
        processes.check()
        time.sleep(0.01)


def convert(
    processes: Processes,
    target: Path,
    accident: Callable[[Processes], None],
    *,
    resume: bool = False,
    job: Job = JOB,
) -> list[int]:
    """A whole conversion; bytes that were taken over, and written by this process."""
    own = processes.own_files(SIZES)
    with ResumableFolder(target, job, SIZES, processes=processes, resume=resume) as folder:
        todo = [name for name in own if name not in folder.finished]
        for name in todo[:BEFORE]:
            write(folder, name)
        accident(processes)
        for name in todo[BEFORE:]:
            write(folder, name)
        folder.commit()
    return [folder.resumed_bytes, sum(SIZES[name] for name in todo)]


def nothing(_processes: Processes) -> None: ...


def happens_to(rank: int, end: Callable[[], None]) -> Callable[[Processes], None]:
    """Something ends one process; the others work on until they learn of it."""

    def accident(processes: Processes) -> None:
        if processes.rank == rank:
            end()
        stay(processes)

    return accident


def killed(rank: int) -> Callable[[Processes], None]:
    """One process is killed. Without torchrun, the others do their part before they learn of it."""

    def accident(processes: Processes) -> None:
        if processes.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            stay(processes)

    return accident


def raising(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


def settings(processes: Processes) -> object:
    def read() -> object:
        raise CheckpointError("config.json: the file is missing")

    return processes.run_on_first(read)


ACCIDENTS: dict[str, Callable[[Processes, Path], object]] = {
    "none": lambda processes, target: convert(processes, target, nothing),
    "two fail": lambda processes, target: convert(
        processes,
        target,
        lambda _: (
            raising(CheckpointError(f"shard {processes.rank} cannot be read"))()
            if processes.rank
            else stay(processes)
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
    "killed": lambda processes, target: convert(processes, target, killed(1)),
    "the first is killed": lambda processes, target: convert(processes, target, killed(0)),
    "interrupted": lambda processes, target: convert(
        processes, target, happens_to(2, raising(KeyboardInterrupt()))
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
            told = processes.run_on_first(lambda: {"first": os.getpid()})
            outcome["first"] = told["first"]
            outcome["done"] = ACCIDENTS[name](processes, home / name)
    except (BridgeError, OSError, KeyboardInterrupt) as error:
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
    target_folder.WORTH_KEEPING = 1
    for name in ACCIDENTS:
        start(home, name, 2 if name == "resumed" else 3)


if __name__ == "__main__":
    target_folder.WORTH_KEEPING = 1
    take_part(Path(sys.argv[1]), sys.argv[2])
