"""Other projects' `megatron.bridge`: a name that only one can have in a process.

`megatron` is a namespace that several projects share, so the first `megatron.bridge` on the path
is imported, and what is asked of it that only another one has fails at that place, later.
"""

import os
from collections.abc import Iterable
from pathlib import Path

MEANT = "MEGATRON_BRIDGE"
"""The environment variable that says which folder is meant."""

_FOREIGN_FILE = "package_info.py"
"""At the top of the other project, and never in this one."""


def check_places(own: str, own_words: str, roots: Iterable[str]) -> None:
    """Refuse to be imported while it is not clear which `megatron.bridge` is meant.

    Args:
        own: the folder of this package.
        own_words: the first line of its `__init__.py`, which copies of this project have, too.
        roots: the folders of the namespace `megatron`, in the order of the path.

    Raises:
        ImportError: another project's is on the path, and the environment does not say that this
            one is meant; or both lie in this folder.
    """
    folder = Path(own).resolve()
    if (folder / _FOREIGN_FILE).is_file():
        raise ImportError(
            f"two projects' megatron.bridge were installed into one folder, {folder}, and each has "
            f"overwritten files of the other; uninstall both (megatron-bridge and "
            f"megatron-bridge-vl), and install one of them in this environment"
        )
    meant = os.environ.get(MEANT)
    if meant and Path(meant).resolve() == folder:
        return
    for root in roots:
        other = Path(root, "bridge").resolve()
        if other != folder and not _says(other / "__init__.py", own_words):
            raise ImportError(
                f"megatron.bridge is on the path twice, and only one of them can be imported:\n"
                f"  {folder}, which is megatron-bridge-vl and comes first\n"
                f"  {other}, another project's\n"
                f"Take one off the path (PYTHONPATH, or uninstall it). To use the first although "
                f"the other is there, set {MEANT}={folder}"
            )


def _says(file: Path, words: str) -> bool:
    """Whether a file begins with these words; also if there is none."""
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            return words in text.readline()
    except FileNotFoundError:
        return True
