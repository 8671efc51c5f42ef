"""Blocks of one file that become blocks of another one, where the file system can share them.

XFS and btrfs can, and others; nothing is read or written then but the lists of blocks. A later
write to either file gives it a block of its own, so neither ever shows in the other.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from pathlib import Path
from struct import Struct

from megatron.bridge.models.hf_pretrained.regular_file import open_regular

BLOCK_BYTES = 4096
"""What a shared range begins and ends with, in both files. File systems with longer blocks copy."""

_FICLONERANGE = 0x4020940D
_ARGUMENT = Struct("=q3Q")

_UNABLE = frozenset(
    {
        errno.EOPNOTSUPP,  # no file system that shares, or a file of it that has no shared blocks
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EXDEV,  # two file systems
        errno.EINVAL,  # blocks longer than BLOCK_BYTES, or files whose blocks are kept differently
        errno.EBADF,
        errno.EPERM,
        errno.EACCES,
        errno.ETXTBSY,
    }
)
"""Errors that say that these ranges cannot be shared; others say that something is wrong."""


class CannotShare(Exception):
    """The file system does not share these ranges, which can be copied all the same."""


def share_range(source: int, source_offset: int, nbytes: int, target: int, offset: int) -> None:
    """Let a range of the file `target` consist of the blocks of a range of the file `source`.

    Args:
        source: descriptor of the file that has the blocks.
        source_offset: where the range begins in it.
        nbytes: its length, not 0; this and the offsets are multiples of BLOCK_BYTES.
        target: descriptor of the file that gets them.
        offset: where the range begins in it.

    Raises:
        CannotShare: this cannot be done with these files.
        OSError: it could be done and failed: the disk is full or broken.
    """
    if sys.platform != "linux":
        raise CannotShare(f"{sys.platform} has no call for it")
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONERANGE, _ARGUMENT.pack(source, source_offset, nbytes, offset))
    except OSError as error:
        if error.errno in _UNABLE:
            raise CannotShare(error.strerror) from None
        raise


def why_not_shared(path: Path, folder: Path) -> str | None:
    """Why files in a folder cannot share blocks with a file; None if they can.

    It is tried, with a file that nobody sees.

    Args:
        path: the file that has the blocks.
        folder: one that is there.

    Raises:
        OSError: the file cannot be read, or the folder takes no file.
    """
    with open_regular(path) as source, tempfile.TemporaryFile(dir=folder) as target:
        if os.fstat(source.fileno()).st_size < BLOCK_BYTES:
            return "it is shorter than a block"
        try:
            share_range(source.fileno(), 0, BLOCK_BYTES, target.fileno(), 0)
        except CannotShare as error:
            return str(error)
    return None
