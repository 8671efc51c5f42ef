"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.expert_layout import ExpertLayout
from megatron.bridge.paths import local_path
from megatron.bridge.target.reflink import REFLINK

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM


class Decorator(Protocol):
    """Adds an option to a function, and leaves it as it is."""

    def __call__[F: Callable[..., Any]](self, function: F, /) -> F: ...


MOST_RANKS = 1 << 17

ENGINE_SIZES = ("tp", "pp", "ep", "etp", "replicas")

# Values of texts. click adds the name of the option to a BadParameter.


def given_path(text: str) -> Path:
    """A path that was given, with `~` expanded. Raises click.BadParameter if it is no path."""
    try:
        return local_path(text)
    except InputError as error:
        raise click.BadParameter(str(error)) from error


def given_file(text: str) -> Path:
    """The path of a file. Raises click.BadParameter if there is no such file."""
    path = given_path(text)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise click.BadParameter(f"{text!r} {what}")
    return path


def positive(text: str) -> int:
    """A whole number of at least 1. Raises click.BadParameter for any other text."""
    if text.isascii() and text.isdecimal() and len(text) <= 18 and int(text):
        return int(text)
    raise click.BadParameter(f"{text[:40]!r} is not a whole number of at least 1")


def not_negative(text: str) -> float:
    """A finite number of at least 0. Raises click.BadParameter for any other text."""
    try:
        number = float(text)
    except ValueError:
        number = nan
    if isfinite(number) and number >= 0:
        return number
    raise click.BadParameter(f"{text[:40]!r} is not a finite number of at least 0")


def _iteration(text: str) -> str:
    if text == "release" or (text.isascii() and text.isdecimal() and len(text) <= 18):
        return text
    raise click.BadParameter(f"{text[:40]!r} is not a number of an iteration, nor release")


def _parallel_size(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= MOST_RANKS:
        return int(text)
    raise click.BadParameter(f"{text[:40]!r} is not a whole number from 1 to {MOST_RANKS}")


def engine_layout(text: str) -> dict[str, int | bool]:
    """Sizes as in ``tp=16,replicas=16,disjoint``. Raises click.BadParameter for any other text."""
    found: dict[str, int | bool] = {}
    for entry in text.split(","):
        name, equals, size = entry.partition("=")
        if name in found:
            raise click.BadParameter(f"{name} is given twice")
        if entry == "disjoint":
            found[entry] = True
        elif name in ENGINE_SIZES and equals:
            try:
                found[name] = _parallel_size(size)
            except click.BadParameter as error:
                raise click.BadParameter(f"{name}: {error.message}") from error
        else:
            known = ", ".join(f"{one}=N" for one in ENGINE_SIZES)
            raise click.BadParameter(f"{entry[:40]!r} is none of {known}, disjoint")
    return found


def bandwidth(text: str) -> float:
    """Bytes per second, of a number of GB/s. Raises click.BadParameter for any other text."""
    if rate := not_negative(text) * 1e9:
        return rate
    raise click.BadParameter("0 GB/s would move nothing")


# Arguments and options: decorators of a command's function, in the order of its help.

hf_source = click.argument(
    "source",
    metavar="SRC",
    help="Hugging Face model: a folder, or a hub id such as org/name.",
)
target = click.argument(
    "target",
    type=given_path,
    metavar="DST",
    help="Folder to make; it appears when it is complete.",
)
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)
force = click.option(
    "--force", is_flag=True, help="Replace an existing target, once the new one is complete."
)
revision = click.option(
    "--revision",
    metavar="NAME",
    help="Branch, tag or commit of a hub id; the same as org/name@REVISION.",
)
iteration = click.option(
    "--iteration",
    type=_iteration,
    metavar="N",
    help="Iteration of the Megatron checkpoint, a number or release. By default the one that "
    "its tracker file names; inspect lists them.",
)
memory = click.option(
    "--memory",
    metavar="SIZE",
    help="Bytes that buffers may take, such as 512MiB or 2GB; 1GiB if not given. Enough for "
    "any model.",
)
max_shard_size = click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Tensor bytes per file of DST, such as 2GB. If not given, Hugging Face files are "
    "split as REF's are, or at 5GB, and Megatron files at 512MiB.",
)
resume = click.option(
    "--resume", is_flag=True, help="Go on with what an interrupted run left in DST.partial."
)
verify_written = click.option(
    "--verify",
    is_flag=True,
    help="Read back what was written and compare it with SRC, bit by bit, before DST appears.",
)


def choice(
    option: str, names: Sequence[str], description: str, default: str | None = None
) -> Decorator:
    """An option that takes one of `names`, which the help lists before the description."""

    def parse(text: str) -> str:
        if text in names:
            return text
        raise click.BadParameter(f"{text[:40]!r} is none of {', '.join(names)}")

    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    return click.option(
        option, type=parse, metavar="NAME", default=default, help=f"{listed}: {description}."
    )


reflink = choice(
    "--reflink",
    REFLINK,
    "share blocks with the files that are read, where their bytes do not change: where the "
    "file system can (XFS, btrfs and others), or else it is an error, or not at all",
    default="auto",
)


def experts(description: str) -> Decorator:
    """--experts, which takes a disk layout of routed experts."""
    return choice("--experts", tuple(ExpertLayout), description)


def part(description: str) -> Decorator:
    """--part, which takes a part of a model, which its bridge knows by name."""
    return click.option("--part", metavar="NAME", help=description)


def size(option: str, description: str) -> Decorator:
    """An option that takes a size of parallelism, or a number of ranks."""
    return click.option(option, type=_parallel_size, metavar="N", help=description)


# What several commands do with values.


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
