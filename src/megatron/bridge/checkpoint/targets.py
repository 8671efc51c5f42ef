"""What an output folder may replace. Overwriting never costs the user the input, or a home."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron.bridge.checkpoint.folder_sync import sync
from megatron.bridge.checkpoint.iterations import is_megatron_checkpoint
from megatron.bridge.errors import InputError, TargetExists

PARTIAL_SUFFIX = ".partial"
_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def partial_of(target: Path) -> Path:
    """The folder beside `target` that holds it while it is not complete.

    Raises InputError for a target that is named like one, or that no folder can lie beside.
    """
    if target.name in ("", ".."):
        raise InputError(f"{target} cannot be a target; give a folder's name")
    if target.name.endswith(PARTIAL_SUFFIX):
        raise InputError(
            f"{target}: names that end in {PARTIAL_SUFFIX} are those of unfinished targets; "
            "choose another name"
        )
    return target.with_name(target.name + PARTIAL_SUFFIX)


def check_target(target: Path, sources: Iterable[str | Path], *, force: bool) -> None:
    """Refuse a target before anything is read.

    Raises TargetExists if it exists and `force` is not set, or if it is neither empty nor a model
    or checkpoint; InputError if replacing it would remove one of `sources`, or write into one, or
    if its name is that of an unfinished target.
    """
    written = (target, partial_of(target.absolute()))
    exists = os.path.lexists(target)
    for source in sources:
        folder = Path(source).expanduser()
        for path in written if folder.exists() else ():
            if _overlap(path.resolve(), folder.resolve()):
                raise InputError(
                    f"{path} and {folder} overlap: writing one would damage the other; "
                    "choose a target outside of it"
                )
    if exists and not _replaceable(target):
        raise TargetExists(
            f"{target} exists already and is neither empty nor a model or checkpoint, so that not "
            "even force replaces it; choose another name, or remove it yourself"
        )
    if exists and not force:
        raise TargetExists(
            f"{target} exists already; choose another name, or give --force (force=True) to "
            "replace it"
        )


def put_in_place(folder: Path, target: Path, *, force: bool) -> None:
    """Rename a complete folder to `target`, beside it, durably.

    With `force` an old target is removed after that; it is restored if the renaming fails. A
    process that is killed just then leaves it as `.<name>.replaced-*`. Raises TargetExists.
    """
    if not os.path.lexists(target):
        folder.rename(target)
        sync(target.parent)
        return
    if not force:
        raise TargetExists(f"{target} was made by someone else meanwhile")
    replaced = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    target.rename(replaced)
    try:
        folder.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    sync(target.parent)
    if replaced.is_dir() and not replaced.is_symlink():
        shutil.rmtree(replaced)
    else:
        replaced.unlink()


def _overlap(a: Path, b: Path) -> bool:
    return a == b or a in b.parents or b in a.parents


def _replaceable(target: Path) -> bool:
    if target.is_symlink() or not target.is_dir():
        return False
    return (
        next(target.iterdir(), None) is None
        or is_megatron_checkpoint(target)
        or any((target / name).is_file() for name in _MODEL_FILES)
    )
