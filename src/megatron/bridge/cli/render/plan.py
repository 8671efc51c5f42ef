"""`plan` as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron.bridge.cli.render.conversion import left_out
from megatron.bridge.cli.render.inspection import identity, peculiarities, plan_rows
from megatron.bridge.cli.render.tables import facts, listing, verdict
from megatron.bridge.cli.units import count
from megatron.bridge.operations.inspection.forecast import ASSUMED_BYTES_PER_SECOND
from megatron.bridge.text.folding import fold, fold_numbers, template
from megatron.bridge.text.sizes import format_bytes

if TYPE_CHECKING:
    from megatron.bridge.operations.inspection.cluster_layout import ParallelLayout
    from megatron.bridge.operations.inspection.forecast import PlanReport
    from megatron.bridge.operations.inspection.rank_share import RankShare
    from megatron.bridge.operations.inspection.summary import TensorSummary

_SHOWN_NAMES = 3


def render_plan(report: PlanReport, layout: ParallelLayout | None) -> RenderableType:
    """Both sides, every row, what the conversion takes, and what each stage of a cluster holds."""
    model = report.model
    parts: list[RenderableType] = [
        facts(
            "Plan",
            [
                ("source", report.source),
                *identity(model),
                *peculiarities(model),
                ("plan", verdict(model.problem is None, "proven", "not proven")),
            ],
        )
    ]
    sides = {"Hugging Face": model.hf, "Megatron": report.megatron}
    if any(sides.values()):
        parts += ["", _sides(sides)]
    parts += plan_rows(model)
    if report.cost is not None:
        parts += ["", _cost(report)]
    if layout is not None:
        experts = model.settings is not None and bool(model.settings.get("num_moe_experts"))
        parts += ["", _cluster(layout, experts=experts), "", _stages(layout), "", _largest(layout)]
    return Group(*parts)


def _sides(sides: dict[str, TensorSummary | None]) -> Table:
    table = listing("Sides", "side", "tensors", "bytes", "dtypes", right=["tensors", "bytes"])
    for name, side in sides.items():
        if side is None:
            continue
        dtypes = (f"{dtype} {format_bytes(size)}" for dtype, (_, size) in side.dtypes.items())
        table.add_row(name, f"{side.keys:,}", f"{side.bytes:,}", ", ".join(dtypes))
    return table


def _cost(report: PlanReport) -> Table:
    cost = report.cost
    if cost is None:
        raise ValueError("only a proven plan has a cost")
    rate = f"{format_bytes(ASSUMED_BYTES_PER_SECOND)}/s"
    download = f", {format_bytes(cost.download)} of it for the download" if cost.download else ""
    return facts(
        f"Conversion ({cost.command})",
        [
            ("reads", f"{cost.reads:,} bytes ({format_bytes(cost.reads)})"),
            ("writes", f"{cost.writes:,} bytes ({format_bytes(cost.writes)})"),
            ("disk space", f"{format_bytes(cost.disk)}{download}"),
            ("memory", f"{cost.memory / 2**30:g} GiB of buffers (--memory), and the interpreter's"),
            ("seconds", f"{cost.seconds:.2f} at {rate}, an assumed rate: nothing was measured"),
            ("left behind", _left_behind(report)),
            ("left out", left_out(report.left_out)),
        ],
    )


def _left_behind(report: PlanReport) -> str:
    if report.format == "megatron":
        if not report.dropped:
            return "nothing"
        return f"{count(len(report.dropped), 'tensor')} without weights: {_some(report.dropped)}"
    files = report.model.side_files
    if not files:
        return "nothing"
    return f"no tensor; {count(len(files), 'side file')}, which export takes from its --hf REF"


def _some(names: tuple[str, ...]) -> str:
    folded = fold(names)
    return ", ".join(folded[:_SHOWN_NAMES]) + (", ..." if len(folded) > _SHOWN_NAMES else "")


def _cluster(layout: ParallelLayout, *, experts: bool) -> Table:
    request, last = layout.request, layout.positions[-1]
    chunks = "" if request.vpp is None else f" of {request.vpp} chunks each"

    def size(dense: int, expert: int) -> str:
        return f"{dense}, experts {expert}" if experts else str(dense)

    return facts(
        f"Parallel layout: {count(request.ranks, 'rank')}",
        [
            ("tensor parallel", size(request.tp, request.etp or request.tp)),
            ("pipeline", f"{count(request.pp, 'stage')}{chunks}"),
            ("context parallel", request.cp),
            ("expert parallel", request.ep if experts else None),
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
    """``0...2, 5``: a table may break it into lines."""
    return fold_numbers(numbers).replace(",", ", ")
