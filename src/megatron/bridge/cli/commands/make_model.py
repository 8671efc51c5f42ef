"""`make-model`: a small random model in the released disk layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron.bridge.cli import parameters
from megatron.bridge.cli.output import open_output

if TYPE_CHECKING:
    from megatron.bridge.operations.amounts import TensorSummary


@dataclass(frozen=True)
class MadeModel:
    """What make-model reports: the arguments, and what lies in the new folder."""

    family: str
    out: Path
    seed: int
    hf: TensorSummary
    files: tuple[str, ...]


@click.option(
    "--family", required=True, metavar="NAME", help="Family; for another name, all are listed."
)
@click.option(
    "--out",
    required=True,
    type=parameters.given_path,
    metavar="DST",
    help="Folder to make; it appears when it is complete.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the config (text.num_hidden_layers=3, tie_word_embeddings=true) or of "
    "the files (num_shards=2, dtype=float32, rope_form=new, fp8=true, experts=per-expert). "
    "Repeatable.",
)
@click.option("--seed", type=int, metavar="N", default=0, help="Of the random weights.")
@parameters.force
@parameters.as_json
def make_model(
    *, family: str, out: Path, settings: tuple[str, ...], seed: int, force: bool, as_json: bool
) -> None:
    """Make a random model with tokenizer, processor and chat template, as released models have.

    The same arguments give the same files.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
        from megatron.bridge.operations.amounts import TensorSummary
        from megatron.bridge.synthetic import make_model as make

        make(family, out, _parse(settings), seed, force=force)
        tensors = TensorSummary.of(TensorIndex.from_folder(out).values())
        files = tuple(sorted(path.name for path in out.iterdir()))
        output.show(MadeModel(family, out, seed, tensors, files))


def _parse(settings: tuple[str, ...]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for setting in settings:
        key, mark, value = setting.partition("=")
        if not mark or not key:
            raise click.BadParameter(f"{setting!r} should be KEY=VALUE", param_hint="--set")
        if key in chosen:
            raise click.BadParameter(f"{key} is set twice", param_hint="--set")
        chosen[key] = value
    return chosen
