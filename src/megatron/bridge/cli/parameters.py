"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.expert_layout import ExpertLayout
from megatron.bridge.paths import local_path
from megatron.bridge.target.reflink import REFLINK

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an existing target, once the new one is complete."),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub id; the same as org/name@REVISION."),
]
HFModel = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Hugging Face model: a folder, or a hub id such as org/name."
    ),
]


def given_path(text: str) -> Path:
    """A path that was given, with `~` expanded. Raises typer.BadParameter if it is no path."""
    try:
        return local_path(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def given_file(text: str) -> Path:
    """The path of a file. Raises typer.BadParameter if there is no such file."""
    path = given_path(text)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise typer.BadParameter(f"{text!r} {what}")
    return path


Target = Annotated[
    Path,
    typer.Argument(
        parser=given_path, metavar="DST", help="Folder to make; it appears when it is complete."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes that buffers may take, such as 512MiB or 2GB; 1GiB if not given. Enough for "
        "any model.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Tensor bytes per file of DST, such as 2GB. If not given, Hugging Face files are "
        "split as REF's are, or at 5GB, and Megatron files at 512MiB.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with what an interrupted run left in DST.partial."),
]
VerifyWritten = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read back what was written and compare it with SRC, bit by bit, before DST appears.",
    ),
]


def _iteration(text: str) -> str:
    if text == "release" or (text.isascii() and text.isdecimal() and len(text) <= 18):
        return text
    raise typer.BadParameter(f"{text[:40]!r} is not a number of an iteration, nor release")


Iteration = Annotated[
    str | None,
    typer.Option(
        "--iteration",
        parser=_iteration,
        metavar="N",
        help="Iteration of the Megatron checkpoint, a number or release. By default the one that "
        "its tracker file names; inspect lists them.",
    ),
]


MOST_RANKS = 1 << 17


def choice_option(names: Sequence[str], description: str) -> Any:
    """An option that takes one of `names`, which the help lists before the description."""

    def parse(text: str) -> str:
        if text in names:
            return text
        raise typer.BadParameter(f"{text[:40]!r} is none of {', '.join(names)}")

    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    return typer.Option(parser=parse, metavar="NAME", help=f"{listed}: {description}.")


Reflink = Annotated[
    Any,
    choice_option(
        REFLINK,
        "share blocks with the files that are read, where their bytes do not change: where the "
        "file system can (XFS, btrfs and others), or else it is an error, or not at all",
    ),
]


def experts_option(description: str) -> Any:
    """An option that takes a disk layout of routed experts."""
    return choice_option(tuple(ExpertLayout), description)


def part_option(description: str) -> Any:
    """An option that takes a part of a model, which its bridge knows by name."""
    return typer.Option(metavar="NAME", help=description)


def size_option(description: str) -> Any:
    """An option that takes a size of parallelism, or a number of ranks."""
    return typer.Option(parser=_parallel_size, metavar="N", help=description)


def _parallel_size(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= MOST_RANKS:
        return int(text)
    raise typer.BadParameter(f"{text[:40]!r} is not a whole number from 1 to {MOST_RANKS}")


def not_negative(text: str) -> float:
    """A finite number of at least 0. Raises typer.BadParameter for any other text."""
    try:
        number = float(text)
    except ValueError:
        number = nan
    if isfinite(number) and number >= 0:
        return number
    raise typer.BadParameter(f"{text[:40]!r} is not a finite number of at least 0")


def hf_model(reference: str, revision: str | None) -> PreTrainedVLM:
    """The Hugging Face model that was given. Raises what `PreTrainedVLM.from_pretrained` does."""
    from megatron.bridge.formats.iterations import is_megatron_folder
    from megatron.bridge.models.hf_pretrained.other_formats import EXPORT_IT
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

    if is_megatron_folder(local_path(reference)):
        raise InputError(f"{reference} is a Megatron checkpoint, {EXPORT_IT}")
    return PreTrainedVLM.from_pretrained(reference, revision)


def no_revision(revision: str | None) -> None:
    """Raise InputError for --revision where no hub id is given."""
    if revision is not None:
        raise InputError("--revision is that of a hub id, which --hf gives")


def no_iteration(source: str, iteration: str | None) -> None:
    """Raise InputError for --iteration of what is not a Megatron checkpoint."""
    if iteration is not None:
        raise InputError(f"{source} is not a Megatron checkpoint: --iteration means nothing for it")
