"""Folders that ranks write together: complete, or as they were."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron.bridge.errors import InputError, TargetExists
from megatron.bridge.live.shared_files import writing
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.target.folder_sync import sync, sync_all
from megatron.bridge.target.staging import staged_folder

_STAGED = ".hugging-face.partial"


@contextmanager
def staged_by_ranks(
    target: Path, ranks: Ranks, *, force: bool = False, beside_files: bool = False
) -> Iterator[Path]:
    """`staged_folder`, made and renamed by one of the ranks; all of them write into it.

    Args:
        target: where the folder is to appear.
        ranks: each enters and leaves the block. What one raises in it, all have to raise.
        force: as of `staged_folder`.
        beside_files: as of `staged_folder`.

    Yields:
        The new folder.

    Raises:
        TargetExists: as of `staged_folder`.
        InputError: as of `staged_folder`; the ranks have different targets, one does not see the
            folder, or cannot go on.
    """
    _check_same(target, ranks)
    with ExitStack() as first:
        folder = staged_folder(target, force=force, beside_files=beside_files)
        staged = ranks.told(lambda: first.enter_context(folder))
        ranks.together(lambda: _check_seen(target, staged))
        yield staged
        ranks.first(first.close)


@contextmanager
def filled_by_ranks(target: Path, ranks: Ranks) -> Iterator[Path]:
    """Give a new folder within an empty one. At the end what is in it moves up, config.json last.

    Args:
        target: the empty folder.
        ranks: as of `staged_by_ranks`.

    Yields:
        The new folder.

    Raises:
        TargetExists: `target` is not empty.
        InputError: there is none, the ranks have different ones, one does not see it, or cannot
            go on.
        CheckpointError: it cannot be written.
    """
    _check_same(target, ranks)
    staged: Path | None = None
    try:
        staged = ranks.told(lambda: _made_within(target))
        ranks.together(lambda: _check_seen(target, staged))
        yield staged
        ranks.first(lambda: _move_up(staged))
    except BaseException:
        if staged is not None and ranks.is_first:
            shutil.rmtree(staged, ignore_errors=True)
        raise


def _check_same(target: Path, ranks: Ranks) -> None:
    targets = ranks.all_of(target.absolute)
    for rank, other in enumerate(targets):
        if other != targets[0]:
            raise InputError(
                f"the target is {targets[0]} on rank 0 and {other} on rank {rank}; give the same "
                f"one on every rank"
            )


def _check_seen(target: Path, staged: Path) -> None:
    if not staged.is_dir():
        raise InputError(f"{target}: not every rank sees it; choose a shared folder")


def _made_within(target: Path) -> Path:
    """A folder in an empty one. Folders that killed processes left there are removed."""
    if not target.is_dir():
        raise InputError(f"{target}: there is no such folder; make it first")
    with writing(target):
        for path in sorted(target.iterdir()):
            if not path.name.startswith(_STAGED) or path.is_symlink() or not path.is_dir():
                raise TargetExists(
                    f"{target} is not empty: it holds {path.name}; give an empty folder"
                )
        for path in target.iterdir():
            shutil.rmtree(path)
        staged = target / f"{_STAGED}-{secrets.token_hex(4)}"
        staged.mkdir()
    return staged


def _move_up(staged: Path) -> None:
    target = staged.parent
    with writing(target):
        tree = [(Path(folder), names) for folder, _, names in os.walk(staged)]
        sync_all(path for at, names in tree for path in (at, *map(at.joinpath, names)))
        for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            path.rename(target / path.name)
        staged.rmdir()
        sync(target)
