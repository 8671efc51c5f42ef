"""A disk as slow as one likes: a file as a block device, which the kernel holds back.

The block I/O controller of the control groups limits what is read from it and written to it, past
the page cache and through it. All that is there to stay is undone in the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.disk_speed import write
from benchmarks.loop_disk import loop_disk
from benchmarks.processes import BenchmarkError

_OPTION = "--slow-disk"
_MKFS = ("mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=0")
_GROUPS = Path("/sys/fs/cgroup")
_PROBE = 256 << 20
_TOO_FAST = 1.15
_NAME = "megatron-bridge-bench"


@contextmanager
def slow_disk(folder: Path, gb_per_second: float, nbytes: int) -> Iterator[Path]:
    """A folder on a disk that has room for `nbytes` and is no faster than `gb_per_second`.

    Args:
        folder: where the file lies that stands for the disk.
        gb_per_second: of 10**9 bytes, for reading as for writing.
        nbytes: of files.

    Raises:
        BenchmarkError: this needs root, a tool or a control group that is not there, or the kernel
            does not hold the disk back.
    """
    with ExitStack() as undo, loop_disk(folder, nbytes, _MKFS, _OPTION) as disk:
        number = disk.device.stat().st_rdev
        _hold_back(f"{os.major(number)}:{os.minor(number)}", int(gb_per_second * 1e9), undo)
        found = min(write(disk.folder, direct, 1, _PROBE) for direct in (True, False))
        if found > _TOO_FAST * gb_per_second:
            raise BenchmarkError(
                f"--slow-disk: the disk writes {found:.2f} GB/s, not {gb_per_second:g}: this "
                "kernel does not hold it back; leave --slow-disk out"
            )
        yield disk.folder


def _hold_back(device: str, rate: int, undo: ExitStack) -> None:
    """Limit a device, given by its numbers, to `rate` bytes per second."""
    groups = _GROUPS / "blkio"
    try:
        if groups.is_dir():  # version 1 limits the device for all processes
            for what in ("read", "write"):
                file = groups / f"blkio.throttle.{what}_bps_device"
                file.write_text(f"{device} {rate}\n")
                undo.callback(file.write_text, f"{device} 0\n")
        else:  # version 2 limits it for a group of processes, which this one joins
            _join_group(device, rate, undo)
    except OSError as error:
        raise BenchmarkError(
            f"--slow-disk needs the block I/O controller of the control groups below {_GROUPS}: "
            f"{error.filename}: {error.strerror}; leave --slow-disk out"
        ) from error


def _join_group(device: str, rate: int, undo: ExitStack) -> None:
    own = Path("/proc/self/cgroup").read_text("utf-8").strip().rpartition("::/")[2]
    before = _GROUPS / own / "cgroup.procs"
    (_GROUPS / "cgroup.subtree_control").write_text("+io +memory\n")
    group = _GROUPS / f"{_NAME}-{os.getpid()}"
    group.mkdir()
    undo.callback(group.rmdir)
    (group / "io.max").write_text(f"{device} rbps={rate} wbps={rate}\n")
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
    undo.callback(before.write_text, f"{os.getpid()}\n")
