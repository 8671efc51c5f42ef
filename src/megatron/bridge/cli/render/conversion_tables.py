"""`import`, `export` and `make-model` as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from megatron.bridge.cli.render.tables import carried_table, facts, listing, number
from megatron.bridge.cli.units import count, exactly, format_rate
from megatron.bridge.text.sizes import format_bytes

if TYPE_CHECKING:
    from megatron.bridge.cli.commands.make_model import MadeModel
    from megatron.bridge.operations.convert import Converted


def render_conversion(done: Converted) -> RenderableType:
    """What was written, and how fast."""
    resumed = done.written.resumed_bytes
    parts: list[RenderableType] = [
        facts(
            f"{done.command}: done",
            [
                ("source", done.source),
                ("target", done.target),
                ("architecture", done.architecture),
                ("tensors", f"{done.keys:,}"),
                ("bytes", exactly(done.bytes)),
                ("quantization", _quantization(done)),
                ("left behind", _left_behind(done.dropped)),
                ("left out", left_out(done.left_out)),
                ("side files", _side_files(done)),
                ("shared", _shared(done)),
                ("resumed", format_bytes(resumed) if resumed else None),
                ("verified", "read back, bit by bit" if done.written.verified else None),
                ("seconds", f"{done.seconds:.2f}"),
                ("speed", format_rate(done.gigabytes_per_second * 1e9, 1)),
            ],
        )
    ]
    if done.carried:
        parts += ["", carried_table(done.carried)]
    if done.inexact:
        table = listing("Not exact on the way back", "tensor", "largest error")
        for tensor in done.inexact:
            table.add_row(Text(tensor.name), number(tensor.max_abs_diff))
        parts += ["", table]
    return Group(*parts)


def render_made_model(made: MadeModel) -> RenderableType:
    """What lies in the new folder."""
    return facts(
        "make-model: done",
        [
            ("family", made.family),
            ("folder", made.out),
            ("seed", made.seed),
            ("tensors", f"{made.hf.keys:,}"),
            ("bytes", exactly(made.hf.bytes)),
            ("files", ", ".join(made.files)),
        ],
    )


def left_out(names: Sequence[str]) -> str | None:
    """What the config names, and neither a checkpoint nor a reference holds."""
    if not names:
        return None
    return (
        f"{count(len(names), 'tensor')} that config.json names and nothing at hand holds, such as "
        f"{names[0]}; --hf takes them from a reference"
    )


def _left_behind(names: Sequence[str]) -> str | None:
    if not names:
        return None
    return f"{count(len(names), 'tensor')}, such as {names[0]}"


def _side_files(done: Converted) -> str | None:
    """The side files that an export wrote; None where a reference gave them, and for an import."""
    if done.reference or done.command != "export":
        return None
    names = ", ".join(done.side_files)
    return f"{names}, and no others (tokenizer, processor): --hf takes them from a reference"


def _shared(done: Converted) -> str | None:
    """What lies in blocks of files that were read; None if nothing does."""
    shared = done.written.shared_bytes
    if not shared:
        return None
    copied = done.written.bytes - shared
    return f"{format_bytes(shared)} in blocks of what was read, {format_bytes(copied)} written"


def _quantization(done: Converted) -> str | None:
    if (used := done.quantization) is None:
        return None
    what = "dequantized to BF16" if done.command == "import" else "quantized again"
    return f"{used.method}, blocks of {used.rows}x{used.columns}: {what}"
