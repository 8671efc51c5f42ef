"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.bridge.errors import TargetExists


@contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a new folder beside `target` to write into; rename it to `target` at the end.

    If the block raises, the new folder is removed and `target` is as it was. A killed process
    leaves a hidden folder `.<name>.partial-*` behind, and `target` as it was.

    Raises TargetExists if `target` exists and `force` is not given; with `force` the old one is
    replaced after the new one is complete.
    """
    target = target.absolute()
    if os.path.lexists(target) and not force:
        raise TargetExists(f"{target} exists already; choose another name, or overwrite by force")
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    staged = target.with_name(f".{target.name}.partial-{token}")
    staged.mkdir()
    try:
        yield staged
        for folder, _, files in os.walk(staged):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if os.path.lexists(target):
            if not force:
                raise TargetExists(f"{target} was made by someone else meanwhile")
            replaced = target.with_name(f".{target.name}.replaced-{token}")
            target.rename(replaced)
            staged.rename(target)
            _remove(replaced)
        else:
            staged.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
