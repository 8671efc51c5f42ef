"""``python -m fuzz TARGET... [options of libFuzzer]``: fuzz targets, guided by coverage.

Each runs until it finds a fault, or as long as the options say. The bytes of a fault are left in
build/fuzz. Without a target, says which there are. Needs atheris.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz.targets import TARGETS

MEMORY = Path("/dev/shm")
"""A file system in memory is ten times as fast as a disk."""


def main() -> int:
    """Fuzz in a process of its own: libFuzzer ends it without giving it time to tidy up."""
    if len(sys.argv) == 1:
        print(*TARGETS)
        return 0
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None
    ) as folder:
        return subprocess.run(
            [sys.executable, "-m", "fuzz.guided", folder, *sys.argv[1:]],
            env={**os.environ, "TMPDIR": folder},
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
