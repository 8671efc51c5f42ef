"""`plan`: what a conversion will do, and what each rank of a cluster will hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from megatron.bridge.cli.options import (
    Iteration,
    Json,
    Revision,
    experts_option,
    hf_model,
    no_iteration,
    no_revision,
    part_option,
    size_option,
)
from megatron.bridge.cli.output import Output, open_output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megatron.bridge.errors import PlanError
    from megatron.bridge.operations.inspection.cluster_layout import ParallelLayout
    from megatron.bridge.operations.inspection.cluster_request import ParallelRequest
    from megatron.bridge.operations.inspection.forecast import PlanReport


def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face model: a folder, a config.json alone, or a hub id; or a Megatron "
            "checkpoint.",
        ),
    ],
    *,
    revision: Revision = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--hf",
            metavar="REF",
            help="Hugging Face model that a checkpoint would be exported like; see export.",
        ),
    ] = None,
    iteration: Iteration = None,
    experts: Annotated[
        str | None,
        experts_option("how the routed experts of SRC lie; see import and export"),
    ] = None,
    part: Annotated[
        str | None, part_option("part of the model, such as language; see import and export")
    ] = None,
    tp: Annotated[int | None, size_option("Tensor-parallel size.")] = None,
    pp: Annotated[int | None, size_option("Pipeline stages.")] = None,
    vpp: Annotated[int | None, size_option("Chunks of each pipeline stage, interleaved.")] = None,
    ep: Annotated[int | None, size_option("Expert-parallel size.")] = None,
    etp: Annotated[
        int | None, size_option("Tensor-parallel size of routed experts; --tp if not given.")
    ] = None,
    cp: Annotated[int | None, size_option("Context-parallel size; only 1 so far.")] = None,
    world_size: Annotated[
        int | None, size_option("Number of ranks; as few as possible if not given.")
    ] = None,
    no_mtp: Annotated[
        bool, typer.Option("--no-mtp", help="Lay out the model without its MTP layer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what import would do with SRC (export, for a checkpoint), without doing it.

    Reads headers and configs only. With a size of parallelism, or --no-mtp, also what each rank
    holds in training, as megatron-core itself declares it. Exits with 2 if the model cannot be
    converted or laid out so, after showing what is known of it.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.errors import InputError

        request = _request(
            no_mtp, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp, world_size=world_size
        )
        report = _report(source, reference, revision, iteration, experts, part)
        if part is not None and request is not None and report.format == "megatron":
            raise InputError(
                "--part with sizes of parallelism is for an import: leave out one of the two"
            )
        layout, illegal = _layout(report, request, output, without=["mtp"] if no_mtp else [])
        _show(report, request, layout, illegal, output)
        if problem := report.model.problem or illegal:
            raise problem


def _report(
    source: str,
    reference: str | None,
    revision: str | None,
    iteration: str | None,
    experts: str | None,
    part: str | None,
) -> PlanReport:
    from megatron.bridge.errors import InputError
    from megatron.bridge.formats.iterations import is_megatron_folder
    from megatron.bridge.operations.inspection.forecast import plan_export_of, plan_import_of
    from megatron.bridge.paths import local_path

    path = local_path(source)
    for_checkpoint = (reference, iteration) != (None, None)
    if not is_megatron_folder(path, asked=for_checkpoint):
        if reference is not None:
            raise InputError(
                f"{source} is not a Megatron checkpoint: --hf is what a checkpoint is exported like"
            )
        no_iteration(source, iteration)
        return plan_import_of(source, revision, experts, part)
    if reference is None:
        no_revision(revision)
        return plan_export_of(path, None, iteration, experts, part)
    return plan_export_of(path, hf_model(reference, revision), iteration, experts, part)


class StageNotes:
    """A Progress that says how many stages are laid out, where that takes long."""

    def __init__(self, note: Callable[[str], None], seconds: float = 5.0) -> None:
        self._note = note
        self._seconds = seconds

    def start(self, task: str, total_bytes: int) -> None:
        """The number of stages."""
        self._total, self._done, self._last = total_bytes, 0, time.monotonic()

    def advance(self, done_bytes: int) -> None:
        """So many more are laid out."""
        self._done += done_bytes
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._note(f"plan: {self._done} of {self._total} stages")


def _request(wanted: bool, **sizes: int | None) -> ParallelRequest | None:
    """The parallel layout that the options ask for; None if none of them was given."""
    from megatron.bridge.operations.inspection.cluster_request import ParallelRequest

    given = {name: size for name, size in sizes.items() if size is not None}
    return ParallelRequest(**given) if given or wanted else None


def _layout(
    report: PlanReport, request: ParallelRequest | None, output: Output, *, without: list[str]
) -> tuple[ParallelLayout | None, PlanError | None]:
    if request is None or report.model.problem is not None:
        return None, None
    output.note("plan: asking megatron-core what each rank holds")
    from megatron.bridge.errors import PlanError
    from megatron.bridge.operations.inspection.cluster import plan_layout

    try:
        progress = StageNotes(output.note)
        return plan_layout(report.model, request, without=without, progress=progress), None
    except PlanError as error:
        return None, error


def _show(
    report: PlanReport,
    request: ParallelRequest | None,
    layout: ParallelLayout | None,
    illegal: PlanError | None,
    output: Output,
) -> None:
    from megatron.bridge.cli.plan_document import plan_document

    def render() -> RenderableType:
        from megatron.bridge.cli.render.plan import render_plan

        return render_plan(report, layout)

    output.show(plan_document(report, request, layout, illegal), render)
