"""File systems that share blocks, mounted from files for the tests: root and mkfs are needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SYSTEMS = ("xfs", "btrfs")

_BYTES = 400 << 20
"""mkfs.xfs makes none below 300 MB. The file is sparse."""


@contextmanager
def mounted(system: str) -> Iterator[Path]:
    """The root of a new, empty file system; the test is skipped where there can be none."""
    if os.geteuid() != 0:
        pytest.skip(f"mounting {system} takes root")
    if (mkfs := shutil.which(f"mkfs.{system}")) is None:
        pytest.skip(f"there is no mkfs.{system} here: install xfsprogs and btrfs-progs")
    with tempfile.TemporaryDirectory(prefix=f"megatron-bridge-{system}-") as name:
        image, point = Path(name, "image"), Path(name, "mounted")
        image.touch()
        os.truncate(image, _BYTES)
        point.mkdir()
        subprocess.run([mkfs, "-q", str(image)], check=True, capture_output=True)
        made = subprocess.run(
            ["mount", "-o", "loop", str(image), str(point)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"{system} cannot be mounted here: {made.stderr.strip()}")
        try:
            yield point
        finally:
            subprocess.run(["umount", "--lazy", str(point)], check=True)


def used_bytes(folder: Path) -> int:
    """Bytes that are taken on a file system, when all that was written is on the disk."""
    os.sync()
    system = os.statvfs(folder)
    return (system.f_blocks - system.f_bfree) * system.f_frsize
