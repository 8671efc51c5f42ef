"""`inspect`: what a model folder, a hub id or a Megatron checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import click

from megatron.bridge.cli import parameters
from megatron.bridge.cli.output import Output, open_output
from megatron.bridge.paths import local_path


@click.argument(
    "source",
    metavar="SRC",
    help="Folder of a Hugging Face model (a config.json will do), hub id, or Megatron checkpoint.",
)
@parameters.revision
@parameters.iteration
@parameters.as_json
def inspect(*, source: str, revision: str | None, iteration: str | None, as_json: bool) -> None:
    """Show what SRC holds and, for a Hugging Face model, whether and how it converts.

    Reads headers and configs only. Exits with 2 if the model cannot be converted, after showing
    what is known of it.
    """
    from megatron.bridge.formats.iterations import is_megatron_folder

    with open_output(as_json=as_json) as output:
        if is_megatron_folder(local_path(source), asked=iteration is not None):
            _inspect_megatron(local_path(source), revision, iteration, output)
        else:
            parameters.no_iteration(source, iteration)
            _inspect_hf(source, revision, output)


def _inspect_hf(source: str, revision: str | None, output: Output) -> None:
    from megatron.bridge.operations.inspection.hf_report import inspect_hf

    report = inspect_hf(source, revision)
    output.show(report)
    if report.problem is not None:
        raise report.problem


def _inspect_megatron(
    source: Path, revision: str | None, iteration: str | None, output: Output
) -> None:
    from megatron.bridge.errors import InputError
    from megatron.bridge.operations.inspection.megatron_report import inspect_megatron

    if revision is not None:
        raise InputError(f"{source} is a folder: --revision means nothing for it")
    output.show(inspect_megatron(source, iteration))
