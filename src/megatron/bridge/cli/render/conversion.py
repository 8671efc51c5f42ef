"""`import`, `export` and `make-model` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from megatron.bridge.cli.render.tables import facts
from megatron.bridge.cli.units import format_bytes, format_rate


def render_conversion(document: Mapping[str, Any]) -> RenderableType:
    """What was written, and how fast."""
    size, dropped = document["bytes"], document["dropped"]
    left = f"{len(dropped)} tensors that are no weights, such as {dropped[0]}" if dropped else None
    return Group(
        facts(
            f"{document['command']}: done",
            [
                ("source", document["source"]),
                ("target", document["target"]),
                ("architecture", document["architecture"]),
                ("tensors", f"{document['keys']:,}"),
                ("bytes", f"{size:,} ({format_bytes(size)})"),
                ("left behind", left),
                ("seconds", f"{document['seconds']:.2f}"),
                ("speed", format_rate(size, document["seconds"])),
            ],
        )
    )


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
