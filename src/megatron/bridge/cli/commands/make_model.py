"""`make-model`: a small random model in the released disk layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron.bridge.cli.output import open_output
from megatron.bridge.cli.parameters import Force, Json, given_path

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


def make_model(
    *,
    family: Annotated[str, typer.Option(help="Family; for another name, all are listed.")],
    out: Annotated[
        Path,
        typer.Option(
            parser=given_path, metavar="DST", help="Folder to make; it appears when it is complete."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the config (text.num_hidden_layers=3, tie_word_embeddings=true)"
            " or of the files (num_shards=2, dtype=float32, rope_form=new, fp8=true, "
            "experts=per-expert). Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a random model with tokenizer, processor and chat template, as released models have.

    The same arguments give the same files.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.cli.render.conversion_tables import render_made_model
        from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
        from megatron.bridge.operations.amounts import TensorSummary
        from megatron.bridge.synthetic import make_model as make

        make(family, out, _parse(settings or []), seed, force=force)
        tensors = TensorSummary.of(TensorIndex.from_folder(out).values())
        files = tuple(sorted(path.name for path in out.iterdir()))
        output.show(MadeModel(family, out, seed, tensors, files), render_made_model)


def _parse(settings: list[str]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for setting in settings:
        key, mark, value = setting.partition("=")
        if not mark or not key:
            raise typer.BadParameter(f"{setting!r} should be KEY=VALUE", param_hint="--set")
        if key in chosen:
            raise typer.BadParameter(f"{key} is set twice", param_hint="--set")
        chosen[key] = value
    return chosen
