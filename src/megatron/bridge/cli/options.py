"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron.bridge.cli.units import parse_size
from megatron.bridge.errors import InputError

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
Target = Annotated[
    Path, typer.Argument(metavar="DST", help="Folder to make; it appears when it is complete.")
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


def size_of(text: str, option: str) -> int:
    """The bytes that were given to an option. Raises InputError, see `parse_size`."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error
