"""`import` and `export`: Hugging Face files to Megatron files and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron.bridge.cli import parameters
from megatron.bridge.cli.output import Output, open_output
from megatron.bridge.models.conversion.transposed import TRANSPOSED, Transposed

if TYPE_CHECKING:
    from megatron.bridge.operations.convert import Converted
    from megatron.bridge.target.reflink import Reflink
    from megatron.bridge.target.run import Run


@parameters.hf_source
@parameters.target
@parameters.revision
@parameters.experts("how the routed experts of SRC lie; refused if their shapes say otherwise")
@parameters.part("language: the language model of a vision-language SRC alone, as a model of text")
@parameters.choice(
    "--transposed",
    TRANSPOSED,
    "how DST holds matrices that lie transposed in SRC (experts of some releases): as they lie "
    "there, with strides that say so, or turned, so that programs load them faster",
    default="copy",
)
@parameters.memory
@parameters.max_shard_size
@parameters.reflink
@parameters.verify_written
@parameters.resume
@parameters.force
@parameters.as_json
def import_command(
    *,
    source: str,
    target: Path,
    revision: str | None,
    experts: str | None,
    part: str | None,
    transposed: Transposed,
    memory: str | None,
    max_shard_size: str | None,
    reflink: Reflink,
    verify: bool,
    resume: bool,
    force: bool,
    as_json: bool,
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
        hf = parameters.hf_model(source, revision)
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


@click.argument("source", type=parameters.given_path, metavar="SRC", help="Megatron checkpoint.")
@parameters.target
@click.option(
    "--hf",
    "reference",
    metavar="REF",
    help="Hugging Face model whose layout and side files DST gets: a folder (a config.json will "
    "do) or a hub id. By default the config that import left in SRC: then DST has weights and "
    "config.json.",
)
@parameters.revision
@parameters.iteration
@parameters.experts("another disk layout of routed experts than REF's")
@parameters.part(
    "language: where SRC is the language model of a vision-language REF alone, put it in its place "
    "in REF; where SRC is a vision-language model, write its language model alone"
)
@click.option(
    "--fp8",
    is_flag=True,
    help="Quantize the weights that REF, an FP8 release, has quantized. Without it they are BF16.",
)
@parameters.choice(
    "--dtype",
    ("bfloat16", "float16", "float32"),
    "dtype of the floating-point tensors, instead of each one's in REF; small tensors that the "
    "release keeps in float32 stay so, and config.json states it",
)
@click.option(
    "--round",
    is_flag=True,
    help="Round values that do not fit the dtype they get. Without it they are refused.",
)
@click.option(
    "--hard-links",
    is_flag=True,
    help="Let files of weights that are those of REF, bit for bit, be hard links to them: a "
    "program that writes into one writes into both.",
)
@click.option(
    "--keep-manifest",
    is_flag=True,
    help="Leave .megatron-bridge.jsonl in DST: checksums of all files, for verify --fast. A "
    "Megatron checkpoint always has it.",
)
@parameters.memory
@parameters.max_shard_size
@parameters.reflink
@parameters.verify_written
@parameters.resume
@parameters.force
@parameters.as_json
def export_command(
    *,
    source: Path,
    target: Path,
    reference: str | None,
    revision: str | None,
    iteration: str | None,
    experts: str | None,
    part: str | None,
    fp8: bool,
    dtype: str | None,
    round: bool,  # noqa: A002 - the name of the option
    hard_links: bool,
    keep_manifest: bool,
    memory: str | None,
    max_shard_size: str | None,
    reflink: Reflink,
    verify: bool,
    resume: bool,
    force: bool,
    as_json: bool,
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
            parameters.no_revision(revision)
        else:
            check_target(target, [source, reference], force=force)
            hf = parameters.hf_model(reference, revision)
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
        output.show(done)
