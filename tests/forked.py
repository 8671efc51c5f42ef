"""Processes forked from one that has imported everything, and that share nothing with the tests.

Importing torch, transformers and megatron-core takes a process about ten seconds. Here one process,
started once for all tests of a pytest process, has imported them, and has done nothing else: a fork
of it is what a new process is after its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import pytest
import torch
import torch.distributed as dist

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["preloaded"])


def ensure_running() -> None:
    """Start the process that is forked, if it does not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it is not passed on otherwise
        forkserver.ensure_running()


def run_ranks(
    worker: Callable[..., None], *args: Any, world: int = 2, seconds: float = 300
) -> None:
    """Run `worker(rank, *args)` in processes that find one another as those of torchrun do.

    Raises what the first of them raises, and TimeoutError if they do not end in time.
    """
    ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = torch.multiprocessing.start_processes(
        _rank, (world, port, worker, args), nprocs=world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{worker.__name__} did not end in {seconds} seconds")


def _rank(rank: int, world: int, port: int, worker: Callable[..., None], args: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    worker(rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
