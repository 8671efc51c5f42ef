"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
