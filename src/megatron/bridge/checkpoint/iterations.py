"""Which folder of a Megatron checkpoint is the one to read, told without torch."""

from pathlib import Path

from megatron.bridge.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"
"""The index of a torch_dist checkpoint, in the folder of an iteration."""


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a torch_dist checkpoint, or iterations with a tracker file."""
    return (folder / TRACKER_FILE).is_file() or (folder / METADATA_FILE).is_file()


def iteration_folder(folder: Path) -> Path:
    """The folder of the latest iteration; a folder of one iteration is returned as it is.

    Raises CheckpointError if there is neither, or if the tracker names an iteration that is not
    there.
    """
    if (folder / METADATA_FILE).is_file():
        return folder
    tracker = folder / TRACKER_FILE
    try:
        word = tracker.read_text().strip()
    except OSError:
        raise CheckpointError(
            f"{folder}: not a Megatron checkpoint: neither {TRACKER_FILE} nor {METADATA_FILE}"
        ) from None
    if word != "release" and not (word.isdecimal() and word.isascii()):
        raise CheckpointError(f"{tracker}: expected a number or 'release', found {word[:40]!r}")
    found = folder / (word if word == "release" else f"iter_{int(word):07d}")
    if not (found / METADATA_FILE).is_file():
        raise CheckpointError(f"{tracker} names {found.name}, which holds no {METADATA_FILE}")
    return found


def write_tracker(folder: Path, iteration: int) -> Path:
    """Make the folder of an iteration and the file that names it the latest; return the folder."""
    (folder / TRACKER_FILE).write_text(str(iteration))
    made = folder / f"iter_{iteration:07d}"
    made.mkdir()
    return made
