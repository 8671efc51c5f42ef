"""Which folder of a Megatron checkpoint is the one to read, told without torch."""

from pathlib import Path

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.quoting import quoted

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_MAX_TRACKER_BYTES = 100
METADATA_FILE = ".metadata"
"""The index of a torch_dist checkpoint, in the folder of an iteration."""


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a torch_dist checkpoint, or iterations with a tracker file."""
    return (folder / TRACKER_FILE).is_file() or (folder / METADATA_FILE).is_file()


def iteration_folder(folder: Path) -> Path:
    """The folder of the latest iteration; a folder of one iteration is returned as it is.

    Raises CheckpointError if there is neither, or if the tracker does not name an iteration that is
    there.
    """
    if (folder / METADATA_FILE).is_file():
        return folder
    tracker = folder / TRACKER_FILE
    try:
        word = read_regular(tracker, _MAX_TRACKER_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        hint = "; it is a Hugging Face model, which import makes one of"
        raise CheckpointError(
            f"{folder}: not a Megatron checkpoint: neither {TRACKER_FILE} nor {METADATA_FILE}"
            f"{hint if (folder / CONFIG_FILE).is_file() else ''}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error}") from error
    if word != "release" and not (word.isdecimal() and word.isascii()):
        raise CheckpointError(f"{tracker}: expected a number or 'release', found {quoted(word)}")
    found = folder / (word if word == "release" else folder_name(int(word)))
    if not (found / METADATA_FILE).is_file():
        raise CheckpointError(f"{tracker} names {found.name}, which holds no {METADATA_FILE}")
    return found


def folder_name(iteration: int) -> str:
    """The folder of an iteration, below that of the tracker file."""
    return f"iter_{iteration:07d}"
