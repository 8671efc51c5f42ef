"""`plan`: what a conversion will do, and what each rank of a cluster will hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from megatron.bridge.cli import parameters
from megatron.bridge.cli.output import Output, open_output

if TYPE_CHECKING:
    from megatron.bridge.operations.inspection.forecast import Forecast


@click.argument(
    "source",
    metavar="SRC",
    help="Hugging Face model: a folder, a config.json alone, or a hub id; or a Megatron "
    "checkpoint.",
)
@parameters.revision
@click.option(
    "--hf",
    "reference",
    metavar="REF",
    help="Hugging Face model that a checkpoint would be exported like; see export.",
)
@parameters.iteration
@parameters.experts("how the routed experts of SRC lie; see import and export")
@parameters.part("part of the model, such as language; see import and export")
@parameters.size("--tp", "Tensor-parallel size.")
@parameters.size("--pp", "Pipeline stages.")
@parameters.size("--vpp", "Chunks of each pipeline stage, interleaved.")
@parameters.size("--ep", "Expert-parallel size.")
@parameters.size("--etp", "Tensor-parallel size of routed experts; --tp if not given.")
@parameters.size("--cp", "Context-parallel size.")
@parameters.size("--world-size", "Number of ranks; as few as possible if not given.")
@click.option(
    "--without",
    multiple=True,
    metavar="PART",
    help="Lay out the model without an optional part, such as mtp. Repeatable.",
)
@click.option(
    "--refit",
    type=parameters.engine_layout,
    metavar="SIZES",
    help="Show what it moves to fill an inference engine from this layout: tp=16,replicas=16, and "
    "pp, ep, etp; etp is 1 with ep, else tp. An engine's rank is taken to want what a Megatron "
    "rank of such sizes would hold. Replicas have the trainer's first ranks, or with disjoint "
    "ranks of their own.",
)
@parameters.size("--ranks-per-node", "Of --refit: consecutive ranks that share a node.")
@click.option(
    "--bandwidth",
    type=parameters.bandwidth,
    metavar="GB/S",
    help="Of --refit: what a rank sends, and receives, in a second; 50 if not given.",
)
@click.option(
    "--route",
    type=parameters.given_path,
    metavar="FILE",
    help="Of --refit: write who sends which box to whom, as JSON lines.",
)
@parameters.as_json
def plan(
    *,
    source: str,
    revision: str | None,
    reference: str | None,
    iteration: str | None,
    experts: str | None,
    part: str | None,
    tp: int | None,
    pp: int | None,
    vpp: int | None,
    ep: int | None,
    etp: int | None,
    cp: int | None,
    world_size: int | None,
    without: tuple[str, ...],
    refit: dict[str, Any] | None,
    ranks_per_node: int | None,
    bandwidth: float | None,
    route: Path | None,
    as_json: bool,
) -> None:
    """Show what import would do with SRC (export, for a checkpoint), without doing it.

    Reads headers and configs only. With a size of parallelism, or --without, also what each rank
    holds in training, as megatron-core itself declares it; with --refit what it moves to fill an
    inference engine from there, and how long that takes. Exits with 2 if the model cannot be
    converted or laid out so, after showing what is known of it.
    """
    sizes = {
        "tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "cp": cp, "world_size": world_size,
    }  # fmt: skip
    given = {name: size for name, size in sizes.items() if size is not None}
    with open_output(as_json=as_json) as output:
        from megatron.bridge.errors import InputError

        asked_of_refit = {
            "--ranks-per-node": ranks_per_node, "--bandwidth": bandwidth, "--route": route,
        }  # fmt: skip
        for option, value in asked_of_refit.items():
            if refit is None and value is not None:
                raise InputError(f"{option} is of --refit, which is not given")
        report = _forecast(source, reference, revision, iteration, experts, part)
        if given or without or refit:
            if part is not None and report.format == "megatron":
                asked = [f"--{name.replace('_', '-')}" for name in given]
                asked += ["--without"] if without else []
                asked += ["--refit"] if refit else []
                raise InputError(
                    f"for a checkpoint, --part excludes {' and '.join(asked)}: leave out one side"
                )
            report = _laid_out(report, given, without, output)
        if refit and report.layout is not None:
            report = _refitted(
                report, EngineAsked(refit, ranks_per_node, bandwidth, route), without, output
            )
        output.show(report)
        if problem := report.problem or report.illegal:
            raise problem


def _forecast(
    source: str,
    reference: str | None,
    revision: str | None,
    iteration: str | None,
    experts: str | None,
    part: str | None,
) -> Forecast:
    from megatron.bridge.errors import InputError
    from megatron.bridge.formats.iterations import is_megatron_folder
    from megatron.bridge.operations.inspection.forecast import forecast_export, forecast_import
    from megatron.bridge.paths import local_path

    path = local_path(source)
    for_checkpoint = (reference, iteration) != (None, None)
    if not is_megatron_folder(path, asked=for_checkpoint):
        if reference is not None:
            raise InputError(
                f"{source} is not a Megatron checkpoint: --hf is what a checkpoint is exported like"
            )
        parameters.no_iteration(source, iteration)
        return forecast_import(source, revision, experts, part)
    if reference is None:
        parameters.no_revision(revision)
        return forecast_export(path, None, iteration, experts, part)
    return forecast_export(path, parameters.hf_model(reference, revision), iteration, experts, part)


class StageNotes:
    """A Progress that says how many stages are laid out, or ranks, where that takes long."""

    def __init__(
        self, note: Callable[[str], None], seconds: float = 5.0, noun: str = "stages"
    ) -> None:
        self._note, self._noun = note, noun
        self._seconds = seconds

    def start(self, task: str, total_bytes: int) -> None:
        """Begin: `total_bytes` is the number of stages."""
        self._total, self._done, self._last = total_bytes, 0, time.monotonic()

    def advance(self, done_bytes: int) -> None:
        """Count stages that are laid out: `done_bytes` more of them."""
        self._done += done_bytes
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._note(f"plan: {self._done} of {self._total} {self._noun}")


def _laid_out(
    report: Forecast, given: dict[str, int], without: tuple[str, ...], output: Output
) -> Forecast:
    """The report with what each rank holds, or why the model cannot be laid out so."""
    from megatron.bridge.errors import PlanError
    from megatron.bridge.runtime.parallel_sizes import ParallelSizes

    sizes = ParallelSizes(**given)
    report = replace(report, sizes=sizes)
    if not report.proven:
        return report
    output.note("plan: asking megatron-core what each rank holds")
    from megatron.bridge.operations.inspection.cluster_legality import layout_of

    try:
        layout = layout_of(report, sizes, without=without, progress=StageNotes(output.note))
    except PlanError as error:
        return replace(report, illegal=error)
    return replace(report, layout=layout)


class EngineAsked(NamedTuple):
    """What is asked of a refit: the sizes of --refit, and its other options."""

    sizes: dict[str, Any]
    ranks_per_node: int | None
    bandwidth: float | None
    route: Path | None


def _refitted(
    report: Forecast, asked: EngineAsked, without: tuple[str, ...], output: Output
) -> Forecast:
    """The report with what a refit moves, or why the engine cannot be laid out so."""
    from megatron.bridge.errors import PlanError
    from megatron.bridge.operations.inspection import refit_forecast
    from megatron.bridge.operations.inspection.refit_route import EngineLayout, write_routes
    from megatron.bridge.text.document import to_document

    engine = EngineLayout(**asked.sizes)
    output.note("plan: asking megatron-core which boxes each rank holds")
    notes = StageNotes(output.note, noun="ranks")
    try:
        routes = refit_forecast.plan_refit(report, engine, without, asked.ranks_per_node, notes)
    except PlanError as error:
        return replace(report, illegal=error)
    if asked.route is not None:
        facts = {
            "kind": "route",
            "source": report.source,
            "trainer": to_document(report.parallel),
            "engine": to_document(engine),
        }
        with open_new(asked.route) as file:
            write_routes(routes, file, facts)
    return replace(report, refit=refit_forecast.forecast_refit(routes, engine, asked.bandwidth))


@contextmanager
def open_new(path: Path) -> Iterator[TextIO]:
    """A text file that must not be there. Raises InputError if it cannot be made."""
    from megatron.bridge.errors import InputError

    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise InputError(f"{path} exists: give --route the name of a new file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    with file:
        yield file
