"""`compare` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from megatron.bridge.cli.render.tables import facts, listing, number, verdict

if TYPE_CHECKING:
    from megatron.bridge.operations.verification.distance import Distance
    from megatron.bridge.operations.verification.logits import CompareReport


def render_compare(report: CompareReport) -> RenderableType:
    """The verdict on the logits, and the distance after every layer."""
    logits = report.logits
    hf, megatron = report.hf_next, report.megatron_next
    table = listing(
        "Distance from transformers",
        "after",
        "max abs diff",
        "largest value",
        "relative RMS",
        "1 - cosine",
        right=["max abs diff", "largest value", "relative RMS", "1 - cosine"],
    )
    for index, layer in enumerate(report.layers):
        table.add_row(f"layer {index}", *_cells(layer))
    table.add_row("logits", *_cells(logits), style="bold")
    return Group(
        facts(
            "compare",
            [
                ("source", report.source),
                ("architecture", report.architecture),
                ("dtype", report.dtype),
                ("prompt", report.prompt),
                ("image", report.image),
                ("tokens", f"{report.tokens}, {report.image_tokens} of them for the image"),
            ],
        ),
        "",
        table,
        facts(
            "",
            [
                ("top-1 agreement", f"{logits.top1_agreement:.2%} of {report.tokens} positions"),
                ("KL divergence", f"{number(logits.kl)} nats"),
                ("next token, transformers", _token(hf.id, hf.text)),
                ("next token, Megatron", _token(megatron.id, megatron.text)),
                ("seconds, transformers", f"{report.hf_seconds:.2f}"),
                ("seconds, Megatron", f"{report.megatron_seconds:.2f}"),
                (
                    "result",
                    verdict(
                        report.agrees,
                        f"the logits agree (allowed: {report.tolerance:g} of the largest)",
                        f"the logits differ (allowed: {report.tolerance:g} of the largest)",
                    ),
                ),
            ],
        ),
    )


def _cells(distance: Distance) -> list[str]:
    return [
        number(distance.max_abs),
        f"{distance.largest:.4g}",
        number(distance.relative_rms),
        number(1 - distance.cosine),
    ]


def _token(token_id: int, text: str) -> Text:
    return Text(f"{text!r} ({token_id})")
