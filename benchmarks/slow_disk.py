"""A disk as slow as one likes: a file as a block device, which the kernel holds back.

The device is a loop device with a file system of its own; the block I/O controller of the control
groups limits what is read from it and written to it, past the page cache and through it. All that
is there to stay is undone in the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks.disk_speed import write
from benchmarks.processes import BenchmarkError

_TOOLS = ("losetup", "mkfs.ext4", "mount", "umount")
_GROUPS = Path("/sys/fs/cgroup")
_PROBE = 256 << 20
_TOO_FAST = 1.15
_PATIENCE = 5
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
    _check()
    size = int(1.05 * nbytes) + (1 << 30)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise BenchmarkError(
            f"{folder} has {free / 1e9:.1f} GB free, the slow disk needs {size / 1e9:.1f} GB; "
            "choose another --folder, or single models with --case"
        )
    with ExitStack() as undo:
        # A process that is ended with SIGTERM would leave the device behind.
        undo.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _stop))
        image = folder / f"{_NAME}.disk"
        undo.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        undo.callback(_run, "losetup", "--detach", device)
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=0", device)
        mounted = folder / f"{_NAME}.mounted"
        mounted.mkdir(exist_ok=True)
        undo.callback(mounted.rmdir)
        _run("mount", device, str(mounted))
        undo.callback(_unmount, mounted)
        number = Path(device).stat().st_rdev
        _hold_back(f"{os.major(number)}:{os.minor(number)}", int(gb_per_second * 1e9), undo)
        found = min(write(mounted, direct, 1, _PROBE) for direct in (True, False))
        if found > _TOO_FAST * gb_per_second:
            raise BenchmarkError(
                f"--slow-disk: the disk writes {found:.2f} GB/s, not {gb_per_second:g}: this "
                "kernel does not hold it back; leave --slow-disk out"
            )
        yield mounted


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _check() -> None:
    if os.geteuid() != 0:
        raise BenchmarkError("--slow-disk makes a block device: run it as root, or leave it out")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise BenchmarkError(f"--slow-disk needs {', '.join(missing)}: install it, or leave it out")


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


def _unmount(mounted: Path) -> None:
    """A process that was killed lets go of its files when the slow disk has taken what it wrote.

    If that is not soon, the kernel takes all away when it is.
    """
    for _ in range(_PATIENCE):
        with suppress(BenchmarkError):
            _run("umount", str(mounted))
            return
        time.sleep(1)
    _run("umount", "--lazy", str(mounted))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"--slow-disk: {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
