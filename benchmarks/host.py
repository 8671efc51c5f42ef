"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe(folder: Path) -> dict[str, str]:
    """Processor, memory, file system of `folder`, kernel and versions, as text."""
    kibibytes = int(_field("/proc/meminfo", "MemTotal").split()[0])
    return {
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{kibibytes / 2**20:.0f} GiB",
        "file system": _file_system(folder.resolve()),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        "PyTorch": version("torch"),
    }


def _field(file: str, name: str) -> str:
    """The first value of a table of the kernel."""
    for line in Path(file).read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`."""
    found = "unknown"
    longest = -1
    for line in Path("/proc/self/mounts").read_text("utf-8").splitlines():
        _, mounted, kind, *_ = line.split()
        if folder.is_relative_to(mounted) and len(mounted) > longest:
            found, longest = kind, len(mounted)
    return found
