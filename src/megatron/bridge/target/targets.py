"""What an output folder may replace. Overwriting never costs the user the input, or a home."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron.bridge.errors import CheckpointError, InputError, TargetExists
from megatron.bridge.formats.iterations import is_megatron_checkpoint
from megatron.bridge.models.hf_pretrained.weight_files import has_weight_files, is_safetensors
from megatron.bridge.paths import PathLike, is_given_folder, local_path
from megatron.bridge.target.folder_sync import sync
from megatron.bridge.target.interruption import uninterrupted
from megatron.bridge.target.mounts import mount_points_within
from megatron.bridge.text.quoting import printable

PARTIAL_SUFFIX = ".partial"
_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
_LONGEST_SUFFIX = len("..replaced-00000000")
"""Bytes that the names of temporary folders beside a target have more than the target's name."""


def partial_of(target: Path) -> Path:
    """The folder beside `target` that holds it while it is not complete.

    Raises:
        InputError: the target is named like such a folder, its name holds control characters, or it
            has none (as "/" has none).
    """
    if target.name in ("", ".."):
        raise InputError(f"{target} cannot be a target; give a folder's name")
    if any(char < " " or "\x7f" <= char <= "\x9f" for char in target.name):
        raise InputError(
            f"{printable(str(target))} cannot be a target: its name holds control characters; "
            "choose another name"
        )
    if target.name.endswith(PARTIAL_SUFFIX):
        raise InputError(
            f"{target}: names that end in {PARTIAL_SUFFIX} are those of unfinished targets; "
            "choose another name"
        )
    return target.with_name(target.name + PARTIAL_SUFFIX)


def check_target(
    target: Path, sources: Iterable[PathLike], *, force: bool, beside_files: bool = False
) -> None:
    """Refuse a target before anything is read.

    Args:
        target: where something is to be written. An empty folder is as good as none.
        sources: what will be read; none where they are read and found good already.
        force: whether a model or checkpoint may be replaced.
        beside_files: whether it may be a folder that holds no weights, whose files stay.

    Raises:
        TargetExists: it exists and `force` is not set, or it is neither empty nor a model or
            checkpoint.
        InputError: replacing it would remove one of `sources`, or write into one; its name is that
            of an unfinished target; no folder can be made or renamed there; or an earlier run was
            killed while it replaced it, and `force` is not set.
    """
    target, given = target.absolute(), list(sources)
    partial = partial_of(target)
    for path in (target, partial):
        if os.path.lexists(path):
            _check_that_it_moves(path)
    folders = [local_path(source) for source in given if is_given_folder(source)]
    for folder in folders:
        for path in (target, partial):
            if _overlap(path.resolve(), folder.resolve()):
                raise InputError(
                    f"{path} and {folder} overlap: writing one would damage the other; "
                    "choose a target outside of it"
                )
    is_free = is_empty_folder(target) or (beside_files and keeps_its_files(target, force=force))
    if os.path.lexists(target) and not is_free:
        if not _replaceable(target):
            raise TargetExists(
                f"{target} exists already and is neither empty nor a model or checkpoint, so that "
                "not even force replaces it; choose another name, or remove it yourself"
            )
        if not force:
            raise TargetExists(
                f"{target} exists already; choose another name, or give --force (force=True) to "
                "replace it"
            )
    elif not is_free and (left := _replaced(target)) and not force:
        raise InputError(
            f"{left[0]} is what {target} was before a run that replaced it was killed; rename it "
            "back, or give --force (force=True) to have it removed when the new one is there"
        )
    # Of sources that are at hand, their own faults are said first; a download is not begun in vain.
    if not given or len(folders) < len(given):
        _check_parent(target)


def publish(folder: Path, target: Path, *, force: bool, without: Iterable[str] = ()) -> None:
    """Rename a complete folder to `target`, beside it, durably, and not to be interrupted.

    With `force` an old target is removed after that; it is restored if the renaming fails. A
    process that is killed just then leaves it as `.<name>.replaced-*`, which the next one with this
    target removes.

    Args:
        folder: the complete one.
        target: its new name.
        force: whether something may have it.
        without: names of files in it that are removed then.

    Raises:
        TargetExists: something has the name.
        CheckpointError: the old one cannot be removed.
    """
    with uninterrupted():
        if not os.path.lexists(target) or is_empty_folder(target):
            folder.rename(target)  # also in the place of an empty folder
            sync(target.parent)
        elif force:
            replaced = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
            target.rename(replaced)
            try:
                folder.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
            sync(target.parent)
        else:
            raise TargetExists(f"{target} was made by someone else meanwhile")
        for name in without:
            (target / name).unlink()
        for old in _replaced(target) if force else ():
            _remove(old, target)


def publish_beside(folder: Path, target: Path) -> None:
    """Move the files of a complete folder into `target`, beside those that are there.

    Weights and what says where they are come last, so that the target is a model when it is whole.

    Args:
        folder: the complete one, on the same file system.
        target: a folder without weights.

    Raises:
        TargetExists: it has a file of the same name; nothing is moved then.
        CheckpointError: a file cannot be moved.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda file: (is_safetensors(file.name), file.as_posix() in _MODEL_FILES))
    for file in files:
        if os.path.lexists(target / file):
            raise TargetExists(
                f"{target / file} exists already; choose another folder, or remove it, or save "
                "the weights alone where only this file is in the way (save_hf_weights)"
            )
    with uninterrupted():
        try:
            for file in files:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).rename(target / file)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be moved: {error.strerror}") from error
        sync(target)
        shutil.rmtree(folder)


def is_empty_folder(path: Path) -> bool:
    """Whether it is a folder, and not a link to one, that holds nothing."""
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def keeps_its_files(target: Path, *, force: bool) -> bool:
    """Whether a folder holds no weights, so that files can be put beside its own.

    What `force` may replace is replaced.
    """
    if not target.is_dir() or (force and _replaceable(target)):
        return False
    return not (has_weight_files(target) or is_megatron_checkpoint(target))


def _remove(old: Path, target: Path) -> None:
    try:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{target} is complete; what it replaced could not be removed "
            f"({error.filename}: {error.strerror}): remove {old} yourself"
        ) from error


def _replaced(target: Path) -> list[Path]:
    """What runs that were killed have left of targets of this name."""
    name = re.compile(rf"\.{re.escape(target.name)}\.replaced-[0-9a-f]{{8}}")
    try:
        return sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name))
    except OSError:
        return []


def _check_that_it_moves(path: Path) -> None:
    """Raise InputError if a folder that is there cannot be renamed, or nobody wants it to be."""
    where = path.resolve()
    for place, what in (
        (Path.cwd(), "the folder in which you are"),
        (local_path("~"), "your home"),
    ):
        if _holds(where, place.resolve()):
            raise InputError(
                f"{path} cannot be replaced: it is or holds {what}; give another folder's name"
            )
    for point in mount_points_within(where):
        if point == where:
            raise InputError(
                f"{path} is a mount point, which cannot be replaced; give a folder inside of it, "
                f"such as {path / 'model'}"
            )
        raise InputError(f"{path} cannot be replaced: {point} is mounted in it; choose another")
    if path.is_symlink() and path.name.endswith(PARTIAL_SUFFIX):
        raise InputError(f"{path} is in the way: it is a link; remove it")


def _check_parent(target: Path) -> None:
    """Raise InputError if nothing can be made beside `target`, as far as the system tells."""
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{target} cannot be made: {parent} is not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{target} cannot be made: {parent} cannot be written to; choose another place"
        )
    longest = os.pathconf(parent, "PC_NAME_MAX")
    if len(os.fsencode(target.name)) + _LONGEST_SUFFIX > longest:
        raise InputError(
            f"{target} cannot be made: its name has {len(os.fsencode(target.name))} bytes, at most "
            f"{longest - _LONGEST_SUFFIX} can be had here; choose a shorter one"
        )


def _overlap(a: Path, b: Path) -> bool:
    return _holds(a, b) or _holds(b, a)


def _holds(folder: Path, path: Path) -> bool:
    return folder == path or folder in path.parents


def _replaceable(target: Path) -> bool:
    if target.is_symlink() or not target.is_dir():
        return False
    return (
        is_empty_folder(target)
        or is_megatron_checkpoint(target)
        or any((target / name).is_file() for name in _MODEL_FILES)
    )
