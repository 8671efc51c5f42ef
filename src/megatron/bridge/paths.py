"""Paths as people give them: on the command line, and in Python."""

from __future__ import annotations

import os
from pathlib import Path

from megatron.bridge.errors import InputError

type PathLike = str | os.PathLike[str]


def local_path(given: PathLike) -> Path:
    """The path with `~` and `~user` expanded; of an unknown user it stays as it is.

    Raises:
        InputError: it is empty, or holds a null character.
    """
    text = os.fspath(given)
    if not text:
        raise InputError("an empty path was given; give a name")
    if "\0" in text:
        raise InputError(f"{text!r} cannot be a path: it holds a null character")
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path.expanduser raises for "~nobody")


def is_given_folder(given: PathLike) -> bool:
    """Whether a path, or what may as well be a hub id, names a folder that is there."""
    try:
        return local_path(given).is_dir()
    except InputError:
        return False
