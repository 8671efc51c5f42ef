"""A lock that says that somebody works in a folder. It ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from megatron.bridge.errors import InputError


class FolderBusy(InputError):
    """Another run works in the folder."""


class FolderLock:
    """A held lock on an existing file: of one owner, or `shared` by several processes of one run.

    The file may be renamed meanwhile.

    Args:
        path: of the file.
        shared: whether other processes may hold it in the same way.

    Raises:
        FolderBusy: somebody else holds it.
        FileNotFoundError: there is no file.
        InputError: the file system has no locks.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._take(path, shared)
            # Whoever held it may have finished and removed the file after it was opened here.
            if not os.path.samestat(os.fstat(self._descriptor), path.stat()):
                raise FolderBusy(f"{path.parent} is being changed by another run")
        except BaseException:
            self.close()
            raise
        self._path = path

    def share(self) -> None:
        """Let the other processes of this run in, but no other run; given up if that fails."""
        try:
            self._take(self._path, shared=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, path: Path, shared: bool) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(
                f"{path.parent} is in use by another run; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            raise InputError(
                f"{path}: the file system cannot lock files ({error.strerror}), so two runs could "
                "write at once; choose a target on another file system"
            ) from error
