"""Reading small untrusted files: never more than a limit, and only regular files.

Symlinks are followed: the hub's cache is made of them. What they lead to may be a pipe, which
waits for a writer, or a device, which never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


@contextmanager
def open_regular(path: Path) -> Iterator[FileIO]:
    """A file opened to read, unbuffered. Raises OSError, also if it is no regular file."""
    # Opening a device can have effects, and what the path leads to can change before it is opened.
    _require_regular(path.stat(), path)
    with FileIO(path, opener=_open_at_once) as file:
        _require_regular(os.fstat(file.fileno()), path)
        yield file


def read_regular(path: Path, limit: int) -> bytes:
    """All of a file. Raises OSError as `open_regular`, ValueError if it has over `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, the limit is {limit}")
        return file.read(size) or b""


def _require_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
