"""`import`, `export` and `make-model` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from megatron.bridge.cli.render.tables import carried_table, facts, listing, number
from megatron.bridge.cli.units import count, format_rate
from megatron.bridge.text.sizes import format_bytes


def render_conversion(document: Mapping[str, Any]) -> RenderableType:
    """What was written, and how fast."""
    size, dropped, written = document["bytes"], document["dropped"], document["written"]
    left = f"{len(dropped)} tensors, such as {dropped[0]}" if dropped else None
    parts: list[RenderableType] = [
        facts(
            f"{document['command']}: done",
            [
                ("source", document["source"]),
                ("target", document["target"]),
                ("architecture", document["architecture"]),
                ("tensors", f"{document['keys']:,}"),
                ("bytes", f"{size:,} ({format_bytes(size)})"),
                ("quantization", _quantization(document)),
                ("left behind", left),
                ("left out", left_out(document["left_out"])),
                ("side files", _side_files(document)),
                (
                    "resumed",
                    format_bytes(resumed) if (resumed := written["resumed_bytes"]) else None,
                ),
                ("verified", "read back, bit by bit" if written["verified"] else None),
                ("seconds", f"{document['seconds']:.2f}"),
                ("speed", format_rate(document["gigabytes_per_second"] * 1e9, 1)),
            ],
        )
    ]
    if carried := document["carried"]:
        parts += ["", carried_table(carried)]
    if inexact := document["inexact"]:
        table = listing("Not exact on the way back", "tensor", "largest error")
        for entry in inexact:
            table.add_row(Text(entry["name"]), number(entry["max_abs_error"]))
        parts += ["", table]
    return Group(*parts)


def left_out(names: Sequence[str]) -> str | None:
    """What the config names, and neither a checkpoint nor a reference holds."""
    if not names:
        return None
    return (
        f"{count(len(names), 'tensor')} that config.json names and nothing at hand holds, such as "
        f"{names[0]}; --hf takes them from a reference"
    )


def _side_files(document: Mapping[str, Any]) -> str | None:
    """Only said where there was no reference to take them from."""
    if document["reference"] or document["command"] != "export":
        return None
    names = ", ".join(document["side_files"])
    return f"{names}, and no others (tokenizer, processor): --hf takes them from a reference"


def _quantization(document: Mapping[str, Any]) -> str | None:
    quantization = document["quantization"]
    if quantization is None:
        return None
    rows, columns = quantization["block"]
    what = "dequantized to BF16" if document["command"] == "import" else "quantized again"
    return f"{quantization['method']}, blocks of {rows}x{columns}: {what}"


def render_made_model(document: Mapping[str, Any]) -> RenderableType:
    """What lies in the new folder."""
    size = document["hf"]["bytes"]
    return facts(
        "make-model: done",
        [
            ("family", document["family"]),
            ("folder", document["out"]),
            ("seed", document["seed"]),
            ("tensors", f"{document['hf']['keys']:,}"),
            ("bytes", f"{size:,} ({format_bytes(size)})"),
            ("files", ", ".join(document["files"])),
        ],
    )
