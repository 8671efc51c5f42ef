"""`plan` as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron.bridge.cli.render.conversion_tables import left_out
from megatron.bridge.cli.render.inspection_tables import dtypes, identity, plan_rows, special_facts
from megatron.bridge.cli.render.tables import facts, listing, verdict
from megatron.bridge.cli.units import count, exact_bytes, exactly
from megatron.bridge.text.folding import fold, fold_numbers, template
from megatron.bridge.text.sizes import format_bytes

if TYPE_CHECKING:
    from megatron.bridge.operations.amounts import TensorSummary
    from megatron.bridge.operations.inspection.cluster_layout import ParallelLayout
    from megatron.bridge.operations.inspection.forecast import ConversionCost, Forecast
    from megatron.bridge.operations.inspection.rank_share import RankShare
    from megatron.bridge.operations.inspection.refit_forecast import RefitForecast

_SHOWN_NAMES = 3


def render_forecast(report: Forecast) -> RenderableType:
    """Both sides, every row, what the conversion takes, and what each stage of a cluster holds."""
    parts: list[RenderableType] = [
        facts(
            "Plan",
            [
                ("source", report.source),
                *identity(report),
                *special_facts(report),
                ("plan", verdict(report.proven, "proven", "not proven")),
            ],
        )
    ]
    if report.refit is not None and report.layout is not None:
        parts += [
            "",
            _cluster(report.layout, experts=_has_experts(report)),
            "",
            _refit(report.refit),
        ]
        return Group(*parts, "", _links(report.refit))
    sides = {"Hugging Face": report.hf, "Megatron": report.megatron}
    if any(sides.values()):
        parts += ["", _sides(sides)]
    parts += plan_rows(report)
    if report.conversion is not None:
        parts += ["", _cost(report.conversion, report)]
    if (layout := report.layout) is not None:
        parts += [
            "",
            _cluster(layout, experts=_has_experts(report)),
            "",
            _stages(layout),
            "",
            _largest(layout),
        ]
    return Group(*parts)


def _has_experts(report: Forecast) -> bool:
    return report.settings is not None and bool(report.settings.get("num_moe_experts"))


def _sides(sides: dict[str, TensorSummary | None]) -> Table:
    table = listing("Sides", "side", "tensors", "bytes", "dtypes", right=["tensors", "bytes"])
    for name, side in sides.items():
        if side is None:
            continue
        table.add_row(name, f"{side.keys:,}", f"{side.bytes:,}", dtypes(side))
    return table


def _cost(cost: ConversionCost, report: Forecast) -> Table:
    rate = f"{format_bytes(cost.assumed_bytes_per_second)}/s"
    fetched = cost.download_bytes
    download = f", {format_bytes(fetched)} of it for the download" if fetched else ""
    return facts(
        f"Conversion ({cost.command})",
        [
            ("reads", exact_bytes(cost.read_bytes)),
            ("writes", exact_bytes(cost.written_bytes)),
            ("disk space", f"{format_bytes(cost.disk_bytes)}{download}"),
            (
                "memory",
                f"{cost.memory_bytes / 2**30:g} GiB of buffers (--memory), and the interpreter's",
            ),
            ("seconds", f"{cost.seconds:.2f} at {rate}, an assumed rate: nothing was measured"),
            ("left behind", _left_behind(report)),
            ("left out", left_out(report.left_out)),
        ],
    )


def _left_behind(report: Forecast) -> str:
    if report.format == "megatron":
        if not report.dropped:
            return "nothing"
        return f"{count(len(report.dropped), 'tensor')}: {_some(report.dropped)}"
    files = report.side_files
    if not files:
        return "nothing"
    return f"no tensor; {count(len(files), 'side file')}, which export takes from its --hf REF"


def _some(names: tuple[str, ...]) -> str:
    folded = fold(names)
    return ", ".join(folded[:_SHOWN_NAMES]) + (", ..." if len(folded) > _SHOWN_NAMES else "")


def _cluster(layout: ParallelLayout, *, experts: bool) -> Table:
    sizes, last = layout.sizes, layout.positions[-1]
    chunks = "" if sizes.vpp is None else f" of {sizes.vpp} chunks each"

    def size(dense: int, expert: int) -> str:
        return f"{dense}, experts {expert}" if experts else str(dense)

    return facts(
        f"Parallel layout: {count(sizes.ranks, 'rank')}",
        [
            ("tensor parallel", size(sizes.tp, sizes.etp or sizes.tp)),
            ("pipeline", f"{count(sizes.pp, 'stage')}{chunks}"),
            ("context parallel", sizes.cp),
            ("expert parallel", sizes.ep if experts else None),
            ("data parallel", size(last.dp + 1, last.edp + 1)),
        ],
    )


def _stages(layout: ParallelLayout) -> Table:
    numbers = ["parameters", "weights", "gradients", "optimizer", "together"]
    table = listing(
        "Each rank of a stage holds", "stage", "ranks", "parts", *numbers, right=numbers
    )
    for stages in _alike(layout):
        share = layout.stages[stages[0]]
        ranks = [rank for stage in stages for rank in layout.ranks_of(stage)]
        sizes = (share.weight_bytes, share.gradient_bytes, share.optimizer_bytes, share.bytes)
        table.add_row(
            _spaced(stages),
            _spaced(ranks),
            _parts(layout, stages),
            f"{share.parameters:,}",
            *map(format_bytes, sizes),
        )
    return table


def _largest(layout: ParallelLayout) -> Table:
    table = listing(
        "Largest tensor of a rank", "stage", "tensor", "shape", "bytes", right=["shape", "bytes"]
    )
    for stages in _alike(layout):
        largest = layout.stages[stages[0]].largest
        names = fold([layout.stages[stage].largest.name for stage in stages])
        shape = "x".join(map(str, largest.shape))
        table.add_row(_spaced(stages), Text("\n".join(names)), shape, format_bytes(largest.bytes))
    return table


def _alike(layout: ParallelLayout) -> list[list[int]]:
    """Stages in groups that differ in the numbers of their layers only."""
    groups: dict[object, list[int]] = {}
    for stage, share in enumerate(layout.stages):
        groups.setdefault(_look(share), []).append(stage)
    return list(groups.values())


def _look(share: RankShare) -> object:
    largest = share.largest
    return (
        tuple(map(len, share.layers)),
        share.parts,
        share.parameters,
        share.weight_bytes,
        share.gradient_bytes,
        share.optimizer_bytes,
        template(largest.name),
        largest.shape,
    )


def _parts(layout: ParallelLayout, stages: list[int]) -> str:
    layers = [layer for stage in stages for chunk in layout.stages[stage].layers for layer in chunk]
    return ", ".join([f"layers {_spaced(layers)}", *layout.stages[stages[0]].parts])


def _spaced(numbers: Iterable[int]) -> str:
    """Numbers as in ``0...2, 5``, which a table may break into lines."""
    return fold_numbers(numbers).replace(",", ", ")


def _refit(refit: RefitForecast) -> Table:
    engine, sizes = refit.engine, refit.engine.sizes
    rate = f"{format_bytes(refit.bytes_per_second)}/s"
    split = f"tensor {sizes.tp}, pipeline {sizes.pp}, experts {sizes.ep} x tensor {sizes.etp}"
    first = refit.ranks - engine.ranks if engine.disjoint else 0
    whose = "beside the trainer" if engine.disjoint else "of the trainer"
    between = None
    if (within := refit.within_node_bytes) is not None:
        between = f"{exactly(within)}; between nodes {exactly(refit.moved_bytes - within)}"
    return facts(
        f"Refit: {count(engine.replicas, 'engine')} of {count(sizes.ranks, 'rank')}",
        [
            ("split of an engine", split),
            (
                "ranks of the engines",
                f"{fold_numbers(range(first, first + engine.ranks))}, {whose}",
            ),
            ("moved", exact_bytes(refit.moved_bytes)),
            ("within nodes", between),
            ("stays on its rank", exact_bytes(refit.own_bytes)),
            ("windows", f"{refit.windows:,} of {format_bytes(refit.window_bytes)} at most"),
            ("seconds", f"{refit.seconds:.3g} window by window, at {rate} each way: computed"),
            ("limit", f"{refit.limit_seconds:.3g} on any route: {exact_bytes(refit.limit_bytes)}"),
        ],
    )


def _links(refit: RefitForecast) -> Table:
    numbers = ["least", "mean", "most"]
    table = listing("Bytes of a rank", "what", "ranks", *numbers, right=["ranks", *numbers])
    for what, spread in (
        ("sent", refit.sent),
        ("received", refit.received),
        ("buffers", refit.buffers),
    ):
        sizes = map(format_bytes, (spread.least, spread.mean, spread.most))
        table.add_row(what, f"{spread.ranks:,}", *sizes)
    return table
