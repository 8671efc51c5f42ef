"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.bridge.target.folder_sync import sync_all
from megatron.bridge.target.interruption import uninterrupted
from megatron.bridge.target.targets import check_target, keeps_its_files, publish, publish_beside


@contextmanager
def staged_folder(
    target: Path, *, force: bool = False, beside_files: bool = False
) -> Iterator[Path]:
    """Give a new folder beside `target` to write into; rename it to `target` at the end.

    If the block raises, the new folder is removed and `target` is as it was. A killed process
    leaves a hidden folder `.<name>.partial-*` behind, and `target` as it was. From the renaming on,
    Ctrl-C and SIGTERM come too late.

    For what takes moments, or whose files are not known before: nothing of it can be resumed.

    Args:
        target: where the folder is to appear.
        force: replace an old target, once the new one is complete.
        beside_files: leave what is in a folder without weights, and put the new files beside it.

    Yields:
        The new folder.

    Raises:
        TargetExists: see `check_target`.
        InputError: see `check_target`.
    """
    target = target.absolute()
    check_target(target, [], force=force, beside_files=beside_files)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        staged.mkdir()
        yield staged
        tree = [(Path(folder), names) for folder, _, names in os.walk(staged)]
        sync_all(path for folder, names in tree for path in (folder, *map(folder.joinpath, names)))
        if beside_files and keeps_its_files(target, force=force):
            publish_beside(staged, target)
        else:
            publish(staged, target, force=force)
    except BaseException:
        with uninterrupted():
            shutil.rmtree(staged, ignore_errors=True)
        raise
