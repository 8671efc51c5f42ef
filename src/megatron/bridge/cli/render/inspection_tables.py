"""`inspect` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from megatron.bridge.cli.render.tables import carried_table, facts, listing, verdict
from megatron.bridge.cli.units import count, exact_bytes, exactly
from megatron.bridge.text.folding import fold, fold_words, template
from megatron.bridge.text.quoting import quoted
from megatron.bridge.text.sizes import format_bytes

if TYPE_CHECKING:
    from megatron.bridge.operations.amounts import FileSize, Shard, TensorSummary
    from megatron.bridge.operations.inspection.hf_report import HFReport
    from megatron.bridge.operations.inspection.megatron_report import MegatronReport
    from megatron.bridge.operations.inspection.row_summary import RowSummary

_ORIGINS = {
    "files": "headers of the files",
    "hub headers": "headers of the files on the hub",
    "config": "what the config asks for (no weights at hand)",
    "checkpoint": "the checkpoint, and the config that it keeps",
    "reference": "the checkpoint, in the layout of --hf",
}
_SHOWN_FILES = 8


def render_hf(report: HFReport) -> RenderableType:
    """A Hugging Face model: what it is, its configs, its rows, and whether it converts."""
    parts: list[RenderableType] = [
        facts(
            "Hugging Face model",
            [
                ("source", report.source),
                *identity(report),
                *_sizes(report.hf),
                *special_facts(report),
                ("shards", _named_sizes(report.shards)),
                ("side files", ", ".join(report.side_files) or "none"),
                *_facts(report, "config"),
                ("default", _settings(report.filled_in)),
                *_facts(report, "model"),
                ("embeddings", "tied" if report.tied else "not tied"),
                ("megatron", _megatron(report)),
                ("plan", verdict(report.proven, "proven", "not proven")),
            ],
        )
    ]
    return Group(*parts, *plan_rows(report))


def identity(report: HFReport) -> list[tuple[str, object]]:
    """What a model is, and where its tensors are known from."""
    return [
        ("architecture", report.architecture),
        ("bridge", report.bridge or "none"),
        ("tensors from", _ORIGINS[report.origin]),
    ]


def special_facts(report: HFReport) -> list[tuple[str, object]]:
    """What not every model has: assumed dtypes, quantization, what the family says of files."""
    return [
        ("dtypes assumed", _assumption(report)),
        ("quantization", _quantization(report)),
        *_facts(report, "files"),
    ]


def _facts(report: HFReport, about: str) -> list[tuple[str, object]]:
    """What the family says of the model."""
    facts = report.description.values()
    return [(fact.label, fact.shown) for fact in facts if fact.about == about]


def plan_rows(report: HFReport) -> list[RenderableType]:
    """The rows of a plan, and what it carries over; nothing without a plan."""
    parts: list[RenderableType] = []
    if rows := report.rows:
        table = listing("Rows of the plan", "count", "Megatron = Hugging Face", right=["count"])
        for row in rows:
            table.add_row(str(row.count), _row(row))
        parts += ["", table]
    if report.carried:
        parts += ["", carried_table(report.carried)]
    return parts


def render_megatron(report: MegatronReport) -> RenderableType:
    """A Megatron checkpoint: what it is, and its tensors."""
    table = listing("Tensors", "key", "shape", "dtype")
    alike: dict[tuple[str, str], list[str]] = {}
    for spec in report.tensors:
        shape = "x".join(map(str, spec.shape)) or "scalar"
        alike.setdefault((template(spec.name), f"{shape} {spec.dtype}"), []).append(spec.name)
    for (_, form), keys in alike.items():
        shape, dtype = form.split()
        for name in fold(keys):
            table.add_row(Text(name), shape, dtype)
    return Group(
        facts(
            f"Megatron checkpoint ({report.index.name})",
            [
                ("source", report.source),
                ("iteration", f"{report.iteration} ({report.folder.name})"),
                ("iterations", _iterations(report)),
                ("format", report.index.why),
                *_sizes(report.megatron),
                ("training state", _state(report.state)),
                ("files", _named_sizes(report.files)),
                ("objects", _objects(report.object_names)),
                ("config record", _record(report)),
                ("hf_model_id", report.hf_model_id),
                ("architecture", report.architecture),
            ],
        ),
        "",
        table,
    )


def _row(row: RowSummary) -> Text:
    layout = "" if row.layout == "same" else f"{row.layout}: "
    return Text(row.megatron).append(f"\n  = {layout}{fold_words(row.hf)}", style="dim")


def _sizes(summary: TensorSummary | None) -> list[tuple[str, object]]:
    if summary is None:
        return [("tensors", "unknown")]
    return [
        ("tensors", f"{summary.keys:,}"),
        ("bytes", exactly(summary.bytes)),
        ("dtypes", dtypes(summary)),
    ]


def dtypes(summary: TensorSummary) -> str:
    """The bytes of each dtype, in words."""
    sizes = (f"{name} {format_bytes(one.bytes)}" for name, one in summary.dtypes.items())
    return ", ".join(sizes)


def _assumption(report: HFReport) -> str | None:
    if not report.dtypes_assumed or report.plan is None:
        return None
    main = next(iter(report.hf.dtypes)) if report.hf is not None else ""
    others: dict[str, list[str]] = {}
    for spec in report.plan.hf.values():
        if spec.dtype != main:
            others.setdefault(spec.dtype, []).append(spec.name)
    parts = [f"{main}, as the config says"]
    for dtype, names in others.items():
        parts.append(f"{dtype} for {', '.join(fold(names))}, as in the release")
    return "no file says them: " + "; ".join(parts)


def _quantization(report: HFReport) -> str | None:
    if report.quantization is None:
        return None
    shown = "; the tensors shown are dequantized" if report.origin == "config" else ""
    return f"{report.quantization}{shown}"


def _named_sizes(files: Sequence[FileSize | Shard]) -> str | None:
    if not files:
        return None
    shown = [f"{file.name} {format_bytes(file.bytes)}" for file in files[:_SHOWN_FILES]]
    more = len(files) - len(shown)
    return "\n".join([*shown, *([f"and {more} more"] if more else [])])


def _settings(values: Mapping[str, Any]) -> str | None:
    return ", ".join(f"{key} {quoted(value)}" for key, value in values.items()) or None


def _megatron(report: HFReport) -> str | None:
    if (side := report.megatron) is None:
        return None
    return f"{count(side.keys, 'tensor')}, {exact_bytes(side.bytes)}"


def _iterations(report: MegatronReport) -> str | None:
    """All iterations, and which one the tracker file names; None where there is no choice."""
    if len(report.iterations) < 2 and report.tracked_iteration in report.iterations:
        return None
    shown = [
        f"{name} (tracked)" if name == report.tracked_iteration else name
        for name in report.iterations
    ]
    return ", ".join(shown) or None


def _record(report: MegatronReport) -> str:
    if report.config_record:
        return "present"
    found = "of another program" if report.other_record else "none"
    return f"{found}: the model is not described, so export and plan need --hf"


def _state(state: TensorSummary) -> str | None:
    if not state.keys:
        return None
    size = f"{count(state.keys, 'tensor')}, {exact_bytes(state.bytes)}"
    return f"{size}: of optimizers and the like, not weights"


def _objects(objects: tuple[str, ...]) -> str:
    if not objects:
        return "none"
    folded = fold(dict.fromkeys(name.partition("/shard_")[0] for name in objects))
    return f"{len(objects)}: " + ", ".join(folded[:3]) + (", ..." if len(folded) > 3 else "")
