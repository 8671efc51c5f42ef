"""A folder that ranks write together, and that appears complete or not at all."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron.bridge.errors import InputError
from megatron.bridge.live.ranks import Ranks
from megatron.bridge.target.staging import staged_folder


@contextmanager
def staged_by_ranks(target: Path, ranks: Ranks, *, force: bool = False) -> Iterator[Path]:
    """`staged_folder`, made and renamed by one of the ranks; all of them write into it.

    Args:
        target: where the folder is to appear; on every rank the same.
        ranks: each enters and leaves the block. What one raises in it, all have to raise.
        force: replace an old target, once the new one is complete.

    Yields:
        The new folder.

    Raises:
        TargetExists: as of `staged_folder`.
        InputError: as of `staged_folder`; a rank does not see the folder, or cannot go on.
    """
    with ExitStack() as first:
        staged = ranks.told(lambda: first.enter_context(staged_folder(target, force=force)))

        def look() -> None:
            if not staged.is_dir():
                raise InputError(f"{target}: not every rank sees it; choose a shared folder")

        ranks.together(look)
        yield staged
        ranks.first(first.close)
