"""Processes forked from one that has imported everything, and that share nothing with the tests.

Importing torch, transformers and megatron-core takes a process about ten seconds. Here one process,
forked from a pytest process when it has imported all test files and before it runs the first test,
does nothing but wait: a fork of it is what a new process is after its imports.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["preloaded"])


_spawn = util.spawnv_passfds


def ensure_running() -> None:
    """Start the process that is forked, if it does not run. To be called before the first test."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it is not passed on otherwise
        if not torch.cuda.is_available():  # asking for it makes a fork unable to use it
            import preloaded  # noqa: F401

            gc.freeze()  # or the collector of each fork would make pages its own
            resource_tracker.ensure_running()
            warnings.simplefilter("ignore")  # the one other thread, of xdist, holds no lock
            patch.setattr(util, "spawnv_passfds", _fork)
        forkserver.ensure_running()


def _fork(_program: Any, _args: Any, descriptors: list[int]) -> int:
    """In place of starting a program that imports it all again."""
    if child := os.fork():
        return child
    util.spawnv_passfds = _spawn  # what is forked may start programs
    try:
        _to_stderr[:] = {int(path.name) for path in Path("/dev/fd").iterdir()} - {
            0,
            1,
            2,
            *descriptors,
        }
        _point_to_stderr()
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        forkserver.main(*descriptors, [])
    finally:
        os._exit(0)


_to_stderr: list[int] = []
"""What the pytest process had open; some handlers of logging hold its stderr."""


def _point_to_stderr() -> None:
    """Closes them, and leaves no number to be used again."""
    for descriptor in _to_stderr:
        with suppress(OSError):  # what listed them is closed by now
            os.dup2(2, descriptor)


def run(
    function: Callable[..., object],
    *args: Any,
    cwd: Path | None = None,
    path: tuple[Path, ...] = (),
    env: Mapping[str, str] | None = None,
) -> CompletedProcess[str]:
    """What a process that calls the function leaves; the status is what it returns, 0 for None.

    path, env: what it finds ahead in sys.path and in the environment.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = processes.reducer.DupFd(out.fileno()), processes.reducer.DupFd(err.fileno())
        process = processes.Process(
            target=_called, args=(files, cwd, [*map(str, path)], dict(env or {}), function, args)
        )
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{function} did not end")
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(args, process.exitcode or 0, out.read(), err.read())


def _called(
    files: Any,
    cwd: Path | None,
    path: list[str],
    env: dict[str, str],
    function: Callable[..., Any],
    args: Any,
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(file.detach(), number)
    _point_to_stderr()
    os.chdir(cwd or ".")
    os.environ |= env
    sys.path[:0] = path
    status = function(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def torchrun(*script: str, world: int = 2) -> CompletedProcess[str]:
    """A script that torchrun starts in several processes, with imports of their own."""
    launcher = ["--standalone", "--nproc-per-node", str(world)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return run(torch.distributed.run.main, [*launcher, *script], env={"PYTHONPATH": paths})


def run_ranks(
    worker: Callable[..., None], *args: Any, world: int = 2, seconds: float = 300
) -> None:
    """Run `worker(rank, *args)` in processes that find one another as those of torchrun do.

    Raises what the first of them raises, and TimeoutError if they do not end in time.
    """
    # Served from here, as torchrun does: a port that is free now may not be when a rank takes it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = torch.multiprocessing.start_processes(
        _rank,
        (world, store.port, worker, args),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + seconds
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{worker.__name__} did not end in {seconds} seconds")


def _rank(rank: int, world: int, port: int, worker: Callable[..., None], args: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    worker(rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
