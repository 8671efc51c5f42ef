"""Where other file systems begin."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def mount_points_within(folder: Path) -> list[Path]:
    """The mount points at `folder` or below it.

    The table of the system names them, also folders that are mounted from the same file system.
    Where there is no table, `folder` alone is looked at.

    Args:
        folder: absolute and without links.
    """
    try:
        lines = _TABLE.read_bytes().splitlines()
    except OSError:
        return [folder] if os.path.ismount(folder) else []
    points = {Path(os.fsdecode(_unescaped(line.split(b" ")[4]))) for line in lines if line}
    return sorted(point for point in points if point == folder or folder in point.parents)


def _unescaped(name: bytes) -> bytes:
    return _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), name)
