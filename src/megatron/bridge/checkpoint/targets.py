"""What an output folder may replace. Overwriting never costs the user the input, or a home."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megatron.bridge.checkpoint.iterations import is_megatron_checkpoint
from megatron.bridge.errors import InputError, TargetExists

_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def check_target(target: Path, sources: Iterable[str | Path], *, force: bool) -> None:
    """Refuse a target before anything is read.

    Raises TargetExists if it exists and `force` is not set, or if it is neither empty nor a model
    or checkpoint; InputError if replacing it would remove one of `sources`, or write into one.
    """
    exists = os.path.lexists(target)
    if exists and not force:
        raise TargetExists(
            f"{target} exists already; choose another name, or give --force (force=True) to "
            "replace it"
        )
    real = target.resolve()
    for source in sources:
        folder = Path(source).expanduser()
        if folder.exists() and _overlap(real, folder.resolve()):
            raise InputError(
                f"{target} and {folder} overlap: writing one would damage the other; "
                "choose a target outside of it"
            )
    if exists and not _replaceable(target):
        raise TargetExists(
            f"{target} is neither empty nor a model or checkpoint, so it is not replaced by force; "
            "choose another name, or remove it yourself"
        )


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
