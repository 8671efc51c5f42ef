"""A file as a disk: a loop device with a file system of its own, gone in the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import BenchmarkError

_TOOLS = ("losetup", "mount", "umount")
_PATIENCE = 5
_NAME = "megatron-bridge-bench"


class LoopDisk(NamedTuple):
    """Where its file system is mounted, and its device."""

    folder: Path
    device: Path


@contextmanager
def loop_disk(folder: Path, nbytes: int, mkfs: Sequence[str], option: str) -> Iterator[LoopDisk]:
    """A new, empty file system that has room for `nbytes`.

    Args:
        folder: where the file lies that stands for the disk.
        nbytes: of files.
        mkfs: makes the file system on the device that is added to it.
        option: of the benchmarks, that asks for it.

    Raises:
        BenchmarkError: this needs root or a tool that is not there, or there is no room.
    """
    _check(mkfs[0], option)
    size = int(1.05 * nbytes) + (1 << 30)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise BenchmarkError(
            f"{folder} has {free / 1e9:.1f} GB free, {option} needs {size / 1e9:.1f} GB; "
            "choose another --folder, or single models with --case"
        )
    with ExitStack() as undo:
        # A process that is ended with SIGTERM would leave the device behind.
        undo.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _stop))
        image = folder / f"{_NAME}.disk"
        undo.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        device = _run(option, "losetup", "--find", "--show", "--direct-io=on", str(image))
        undo.callback(_run, option, "losetup", "--detach", device)
        _run(option, *mkfs, device)
        mounted = folder / f"{_NAME}.mounted"
        mounted.mkdir(exist_ok=True)
        undo.callback(mounted.rmdir)
        _run(option, "mount", device, str(mounted))
        undo.callback(_unmount, option, mounted)
        yield LoopDisk(mounted, Path(device))


def can_make_disks(systems: Mapping[str, Sequence[str]]) -> bool:
    """Whether there is all that file systems take, by what makes each of them."""
    tools = (*_TOOLS, *(mkfs[0] for mkfs in systems.values()))
    return os.geteuid() == 0 and all(map(shutil.which, tools))


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _check(mkfs: str, option: str) -> None:
    if os.geteuid() != 0:
        raise BenchmarkError(f"{option} makes a block device: run it as root, or leave it out")
    missing = [tool for tool in (*_TOOLS[:1], mkfs, *_TOOLS[1:]) if shutil.which(tool) is None]
    if missing:
        raise BenchmarkError(f"{option} needs {', '.join(missing)}: install it, or leave it out")


def _unmount(option: str, mounted: Path) -> None:
    """A process that was killed lets go of its files when the disk has taken what it wrote.

    If that is not soon, the kernel takes all away when it is.
    """
    for _ in range(_PATIENCE):
        with suppress(BenchmarkError):
            _run(option, "umount", str(mounted))
            return
        time.sleep(1)
    _run(option, "umount", "--lazy", str(mounted))


def _run(option: str, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{option}: {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
