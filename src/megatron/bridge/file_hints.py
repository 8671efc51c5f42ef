"""What Linux can be told and asked about ranges of a file, where Python has no functions for it.

That makes reading and writing faster; no byte depends on it. Where the system or the file system
does not know one of the calls, nothing is done. What a disk says of a write that failed is raised.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Any

_UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE)
_CACHESTAT = 451
"""The number of a system call that the C library may not know; the same on every processor."""

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4

_LIBRARY = ctypes.CDLL(None, use_errno=True)
"""What this process has loaded, the C library included."""


def reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its blocks on the disk, if the file system can do that without writing them.

    Not `os.posix_fallocate`: where the file system cannot, that writes into every block.

    Raises:
        OSError: the disk is too small.
    """
    if nbytes:
        _call("fallocate", descriptor, ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes))


def start_writing(descriptor: int, offset: int, nbytes: int) -> bool:
    """Let the kernel begin to write a range from the cache to the disk; False if it cannot."""
    return _sync(descriptor, offset, nbytes, _WRITE)


def finish_writing(descriptor: int, offset: int, nbytes: int) -> bool:
    """Wait until a range is written to the disk; False if the kernel does not know how.

    That is for speed only: what makes it last through a power cut is `fsync`.

    Raises:
        OSError: the disk failed.
    """
    return _sync(descriptor, offset, nbytes, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)


def forget(descriptor: int, offset: int = 0, nbytes: int = 0) -> None:
    """Drop a range from the cache, if it is on the disk; with no length, all from `offset` on."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def cached_bytes(descriptor: int) -> int | None:
    """How much of a file is in the page cache, in whole pages; None if the kernel does not say.

    Kernels say so since Linux 6.5, and only of a file that one may write to.
    """
    whole, counted = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
    call = (ctypes.c_int(descriptor), whole, counted, ctypes.c_uint(0))
    if _LIBRARY.syscall(ctypes.c_long(_CACHESTAT), *call):
        return None
    return counted[0] * mmap.PAGESIZE


def _sync(descriptor: int, offset: int, nbytes: int, flags: int) -> bool:
    begin, length = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
    return _call("sync_file_range", descriptor, begin, length, ctypes.c_uint(flags))


def _call(name: str, descriptor: int, *arguments: Any) -> bool:
    """Call a function of the C library; False if it is unknown to it or to the file system."""
    function = getattr(_LIBRARY, name, None)
    if function is None:
        return False
    while function(ctypes.c_int(descriptor), *arguments):
        code = ctypes.get_errno()
        if code in _UNKNOWN:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
