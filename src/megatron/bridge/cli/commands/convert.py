"""`import` and `export`: Hugging Face files to Megatron files and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron.bridge.cli.output import Output, open_output
from megatron.bridge.cli.parameters import (
    Force,
    HFModel,
    Iteration,
    Json,
    MaxShardSize,
    Memory,
    Reflink,
    Resume,
    Revision,
    Target,
    VerifyWritten,
    choice_option,
    experts_option,
    given_path,
    hf_model,
    no_revision,
    part_option,
)
from megatron.bridge.models.conversion.transposed import TRANSPOSED

if TYPE_CHECKING:
    from megatron.bridge.operations.convert import Converted
    from megatron.bridge.target.run import Run


def import_command(
    source: HFModel,
    target: Target,
    *,
    revision: Revision = None,
    experts: Annotated[
        str | None,
        experts_option("how the routed experts of SRC lie; refused if their shapes say otherwise"),
    ] = None,
    part: Annotated[
        str | None,
        part_option(
            "language: the language model of a vision-language SRC alone, as a model of text"
        ),
    ] = None,
    transposed: Annotated[
        Any,
        choice_option(
            TRANSPOSED,
            "how DST holds matrices that lie transposed in SRC (experts of some releases): as they "
            "lie there, with strides that say so, or turned, so that programs load them faster",
        ),
    ] = "copy",
    memory: Memory = None,
    max_shard_size: MaxShardSize = None,
    reflink: Reflink = "auto",
    verify: VerifyWritten = False,
    resume: Resume = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the Hugging Face model SRC as the Megatron checkpoint DST.

    The checkpoint is torch_dist, as megatron-core saves it, and loads at any parallel layout. The
    conversion is proven before the first byte is written. The weights of an FP8 release are
    dequantized to BF16.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.operations.convert import import_checkpoint
        from megatron.bridge.operations.options import ConversionOptions
        from megatron.bridge.target.targets import check_target

        check_target(target, [source], force=force)
        hf = hf_model(source, revision)
        _note_what_is_resumed(output, target, resume=resume)
        options = ConversionOptions(
            experts=experts,
            part=part,
            memory=memory,
            max_shard_size=max_shard_size,
            verify=verify,
            resume=resume,
            force=force,
            reflink=reflink,
            transposed=transposed,
        )
        with options.run(output.progress) as run:
            done = import_checkpoint(hf, target, **options.of_import, run=run)
        _show(output, run, done)


def export_command(
    source: Annotated[
        Path, typer.Argument(parser=given_path, metavar="SRC", help="Megatron checkpoint.")
    ],
    target: Target,
    *,
    reference: Annotated[
        str | None,
        typer.Option(
            "--hf",
            metavar="REF",
            help="Hugging Face model whose layout and side files DST gets: a folder (a config.json "
            "will do) or a hub id. By default the config that import left in SRC: then DST has "
            "weights and config.json.",
        ),
    ] = None,
    revision: Revision = None,
    iteration: Iteration = None,
    experts: Annotated[
        str | None, experts_option("another disk layout of routed experts than REF's")
    ] = None,
    part: Annotated[
        str | None,
        part_option(
            "language: where SRC is the language model of a vision-language REF alone, put it in "
            "its place in REF; where SRC is a vision-language model, write its language model "
            "alone"
        ),
    ] = None,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="Quantize the weights that REF, an FP8 release, has quantized. Without it they "
            "are BF16.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        choice_option(
            ("bfloat16", "float16", "float32"),
            "dtype of the floating-point tensors, instead of each one's in REF; small tensors that "
            "the release keeps in float32 stay so, and config.json states it",
        ),
    ] = None,
    round: Annotated[  # noqa: A002 - the name of the option
        bool,
        typer.Option(
            "--round",
            help="Round values that do not fit the dtype they get. Without it they are refused.",
        ),
    ] = False,
    hard_links: Annotated[
        bool,
        typer.Option(
            "--hard-links",
            help="Let files of weights that are those of REF, bit for bit, be hard links to them: "
            "a program that writes into one writes into both.",
        ),
    ] = False,
    keep_manifest: Annotated[
        bool,
        typer.Option(
            "--keep-manifest",
            help="Leave .megatron-bridge.jsonl in DST: checksums of all files, for verify --fast. "
            "A Megatron checkpoint always has it.",
        ),
    ] = False,
    memory: Memory = None,
    max_shard_size: MaxShardSize = None,
    reflink: Reflink = "auto",
    verify: VerifyWritten = False,
    resume: Resume = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the Megatron checkpoint SRC as the Hugging Face model DST.

    Names, shapes, dtypes, shards and side files (tokenizer, processor, chat template) are those of
    REF; where REF holds no weights, the dtypes are the checkpoint's. A checkpoint in another dtype
    than REF is exported exactly or, with --round, rounded. What SRC has no place for, such as the
    MTP layer of a model that was trained without it, comes from REF; without --hf it is left out,
    and named.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.operations.convert import export_checkpoint
        from megatron.bridge.operations.options import ConversionOptions
        from megatron.bridge.target.targets import check_target

        hf = None
        if reference is None:
            check_target(target, [source], force=force)
            no_revision(revision)
        else:
            check_target(target, [source, reference], force=force)
            hf = hf_model(reference, revision)
        _note_what_is_resumed(output, target, resume=resume)
        options = ConversionOptions(
            experts=experts,
            part=part,
            memory=memory,
            max_shard_size=max_shard_size,
            verify=verify,
            resume=resume,
            force=force,
            reflink=reflink,
            iteration=iteration,
            fp8=fp8,
            dtype=dtype,
            round=round,
            hard_links=hard_links,
            keep_manifest=keep_manifest,
        )
        with options.run(output.progress) as run:
            done = export_checkpoint(source, target, hf, **options.of_export, run=run)
        _show(output, run, done)


def _note_what_is_resumed(output: Output, target: Path, *, resume: bool) -> None:
    """Say that everything is done anew: with a mistyped name, nobody would notice otherwise."""
    from megatron.bridge.target.targets import partial_of

    if resume and not (partial := partial_of(target.absolute())).exists():
        output.note(f"nothing to resume: there is no {partial.name}; beginning anew")


def _show(output: Output, run: Run, done: Converted) -> None:
    if run.processes.is_first:
        from megatron.bridge.cli.render.conversion_tables import render_conversion

        output.show(done, render_conversion)
