"""Which folder of a Megatron checkpoint is the one to read, told without torch."""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.other_formats import (
    is_older_checkpoint,
    other_checkpoint,
)
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE, has_weight_files
from megatron.bridge.text.quoting import printable, quoted

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_MAX_TRACKER_BYTES = 100
METADATA_FILE = ".metadata"
"""The index of a torch_dist checkpoint, in the folder of an iteration."""

RELEASE = "release"
"""Stands for a number: a checkpoint that was converted and not trained."""

_ITERATION_FOLDER = re.compile(r"iter_([0-9]{7,})", re.ASCII)
_SHOWN_ITERATIONS = 12

type Iteration = int | str
"""A number, or RELEASE."""


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a torch_dist checkpoint, or iterations with a tracker file."""
    return (folder / TRACKER_FILE).is_file() or (folder / METADATA_FILE).is_file()


def is_megatron_folder(folder: Path, *, asked: bool = False) -> bool:
    """Whether a folder is one of a Megatron trainer: also without a tracker file, also older ones.

    Older formats are recognised, so that an error can name them, and not read. A folder that
    transformers would load is a Hugging Face model, whatever lies beside the model, unless `asked`.

    Args:
        folder: the one that is looked at.
        asked: whether something was given that has a meaning for a checkpoint only, such as an
            iteration.
    """
    if not asked and _holds_model(folder):
        return False
    if is_megatron_checkpoint(folder):
        return True
    if not folder.is_dir() or (folder / CONFIG_FILE).is_file():
        return False
    # A folder by the name of release can be anything.
    released = (folder / RELEASE / METADATA_FILE).is_file()
    return released or any(map(str.isdecimal, iterations(folder))) or is_older_checkpoint(folder)


def _holds_model(folder: Path) -> bool:
    """Whether there are a config and weights of a Hugging Face model, or an index of weights."""
    has_config = (folder / CONFIG_FILE).is_file()
    return has_config and (has_weight_files(folder) or (folder / INDEX_FILE).is_file())


def iterations(folder: Path) -> list[str]:
    """The iterations that lie in a folder, "100" or "release", in ascending order."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    numbers = [int(found[1]) for name in names if (found := _ITERATION_FOLDER.fullmatch(name))]
    return [*map(str, sorted(numbers)), *([RELEASE] if RELEASE in names else [])]


def tracked_iteration(folder: Path) -> str | None:
    """The iteration that the tracker file names; None without one. Raises CheckpointError."""
    tracker = folder / TRACKER_FILE
    try:
        word = read_regular(tracker, _MAX_TRACKER_BYTES).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error}") from error
    if word == RELEASE:
        return word
    if not (word.isdecimal() and word.isascii()):
        raise CheckpointError(f"{tracker}: expected a number or 'release', found {quoted(word)}")
    return str(int(word))


def iteration_folder(folder: Path, iteration: Iteration | None = None) -> Path:
    """The folder of an iteration.

    Args:
        folder: of a checkpoint; that of one iteration is returned as it is.
        iteration: None for the one that the tracker file names.

    Raises:
        CheckpointError: the folder is not that of a checkpoint, there is no such iteration, no
            tracker file names one, or it is in another format.
        InputError: another iteration is asked of the folder of one.
    """
    if (folder / METADATA_FILE).is_file():
        if iteration is not None and folder.absolute().name != folder_name(iteration):
            raise InputError(
                f"{folder} is the folder of one iteration; --iteration (iteration=) is for the "
                "folder that holds several"
            )
        return folder
    there = iterations(folder)
    if iteration is not None:
        asked = f"there is no iteration {iteration} in {folder}"
        return _checked(folder / folder_name(iteration), asked, there)
    tracked = tracked_iteration(folder)
    if tracked is not None:
        asked = (
            f"{folder / TRACKER_FILE} names {folder_name(tracked)}, which holds no {METADATA_FILE}"
        )
        return _checked(folder / folder_name(tracked), asked, there)
    if there:
        raise CheckpointError(
            f"{folder}: no {TRACKER_FILE} says which iteration to read; {_choice(there)}"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; expected a Megatron checkpoint")
    if (other := other_checkpoint(folder)) is not None:
        raise CheckpointError(other)
    is_model = (folder / CONFIG_FILE).is_file() or any(folder.glob("*.safetensors"))
    hint = "; it is a Hugging Face model, which import makes one of"
    raise CheckpointError(
        f"{folder}: not a Megatron checkpoint: neither {TRACKER_FILE} nor {METADATA_FILE}"
        f"{hint if is_model else ''}"
    )


def folder_name(iteration: Iteration) -> str:
    """The folder of an iteration, below that of the tracker file."""
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


def _checked(found: Path, otherwise: str, there: Sequence[str]) -> Path:
    """The folder of an iteration if it has an index."""
    if (found / METADATA_FILE).is_file():
        return found
    if found.is_dir() and (other := other_checkpoint(found)) is not None:
        raise CheckpointError(other)
    others = [name for name in there if folder_name(name) != found.name]
    raise CheckpointError(f"{printable(otherwise)}; {_choice(others)}")


def _choice(there: Sequence[str]) -> str:
    if not there:
        return "there are no others"
    shown = there
    if len(there) > _SHOWN_ITERATIONS:
        half = _SHOWN_ITERATIONS // 2
        shown = [*there[:half], "...", *there[-half:]]
    return f"there are {', '.join(shown)}; choose one by --iteration N (iteration=N)"
