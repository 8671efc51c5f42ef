"""What Linux can be told about ranges of a file, for which Python has no functions.

They make writing faster; no byte depends on them. Where the system or the file system does not know
one of them, nothing is done. What a disk says of a write that failed is raised.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

_UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE)
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4

_LIBRARY = ctypes.CDLL(None, use_errno=True)
"""What this process has loaded, the C library included."""


def reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its length, and its blocks on the disk where the file system can do that at once.

    Not `os.posix_fallocate`: where the file system cannot, that writes into every block.

    Raises:
        OSError: the disk is too small.
    """
    os.ftruncate(descriptor, nbytes)
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
