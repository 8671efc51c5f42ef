"""`verify` as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from megatron.bridge.cli.render.tables import carried_table, facts, listing, number, verdict
from megatron.bridge.cli.units import count, exact_bytes, format_rate
from megatron.bridge.text.folding import fold

if TYPE_CHECKING:
    from megatron.bridge.operations.verification.report import (
        FastReport,
        Files,
        TensorDifference,
        VerifyReport,
    )

_SHOWN = 50
_FORMATS = {"huggingface": "Hugging Face", "megatron": "Megatron"}


def render_verify(report: VerifyReport) -> RenderableType:
    """The verdict, and every tensor that is not the same."""
    size, seconds = report.bytes, report.seconds
    parts: list[RenderableType] = [
        facts(
            "verify",
            [
                ("A", _files(report.a)),
                ("B", _files(report.b)),
                ("compared", f"{report.compared:,} tensors, {exact_bytes(size)}"),
                ("equal", f"{report.equal:,} tensors"),
                ("not compared", _not_compared(report)),
                ("side files", _side_files(report)),
                ("seconds", f"{seconds:.2f} ({format_rate(size, seconds)} per side)"),
                ("result", verdict(report.identical, "identical, bit for bit", "they differ")),
            ],
        )
    ]
    if report.different:
        table = listing("Not equal", "tensor", "what", "difference")
        for tensor in report.different[:_SHOWN]:
            table.add_row(Text(tensor.name), tensor.what, Text(_difference(tensor)))
        parts += ["", table, *_rest(len(report.different))]
    parts += _names("Only in A", report.only_in_a)
    parts += _names("Only in B", report.only_in_b)
    if report.carried:
        parts += ["", carried_table(report.carried)]
    return Group(*parts)


def render_verify_fast(report: FastReport) -> RenderableType:
    """The verdict, and every range of a file that is not as it was written."""
    size = report.bytes
    parts: list[RenderableType] = [
        facts(
            "verify --fast",
            [
                ("target", _files(report.target)),
                ("source", _source(report)),
                ("checked", f"{report.files:,} files, {exact_bytes(size)}"),
                ("seconds", f"{report.seconds:.2f} ({format_rate(size, report.seconds)})"),
                ("result", verdict(report.identical, "as it was written", _fault(report))),
            ],
        )
    ]
    if report.different:
        table = listing("Not as it was written", "file", "bytes", "found")
        for found in report.different[:_SHOWN]:
            span = f"{found.offset:,} to {found.offset + found.bytes:,}"
            table.add_row(Text(found.file), span, Text(found.problem))
        parts += ["", table, *_rest(len(report.different))]
    tensors = list(dict.fromkeys(name for found in report.different for name in found.tensors))
    parts += _names("Tensors with data there", tensors)
    if report.source_changes:
        table = listing("Changes of the source", "file")
        for change in report.source_changes[:_SHOWN]:
            table.add_row(Text(change))
        parts += ["", table, *_rest(len(report.source_changes))]
    return Group(*parts)


def _files(files: Files) -> str:
    return f"{files.source} ({_FORMATS[files.format]})"


def _fault(report: FastReport) -> str:
    return "not as it was written" if report.different else "made from something else, or older"


def _source(report: FastReport) -> str | None:
    if report.converted_from is None:
        return None
    state = "changed" if report.source_changes else "as it was read"
    return f"{_files(report.converted_from)}: {state}"


def _names(title: str, names: Sequence[str]) -> list[RenderableType]:
    """Names of tensors, folded; nothing for none."""
    if not names:
        return []
    folded = fold(names)
    table = listing(f"{title}: {len(names)}", "tensor")
    for name in folded[:_SHOWN]:
        table.add_row(Text(name))
    return ["", table, *_rest(len(folded))]


def _difference(tensor: TensorDifference) -> str:
    if tensor.max_abs_diff is None:
        return f"A {tensor.a}, B {tensor.b}"
    return f"{tensor.elements:,} of {tensor.of:,} elements, up to {number(tensor.max_abs_diff)}"


def _not_compared(report: VerifyReport) -> str | None:
    parts = []
    if report.padding_elements:
        parts.append(f"{count(report.padding_elements, 'element')} that pad the vocabulary")
    if report.ignored:
        parts.append(f"{count(len(report.ignored), 'tensor')}, such as {report.ignored[0]}")
    if report.carried:
        parts.append(
            f"{count(len(report.carried), 'tensor')} that the Megatron model has no place for"
        )
    return "; ".join(parts) or None


def _side_files(report: VerifyReport) -> str | None:
    if report.side_files is None:
        return None
    if not report.side_files:
        return "all equal"
    return ", ".join(f"{entry.file} ({entry.what})" for entry in report.side_files)


def _rest(total: int) -> list[RenderableType]:
    return [f"... and {total - _SHOWN:,} more; --json lists all"] if total > _SHOWN else []
