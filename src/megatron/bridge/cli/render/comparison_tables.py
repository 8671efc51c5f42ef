"""`compare` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from megatron.bridge.cli.render.tables import facts, listing, number, verdict

if TYPE_CHECKING:
    from megatron.bridge.operations.verification.distance import Distance
    from megatron.bridge.operations.verification.logits import CompareReport, NextToken


def render_compare(report: CompareReport) -> RenderableType:
    """The verdict on the logits, and the distance after every layer."""
    logits = report.logits
    hf, megatron = report.next_token.hf, report.next_token.megatron
    table = listing(
        "Distance from transformers",
        "after",
        "max abs diff",
        "largest value",
        "relative RMS",
        "1 - cosine",
        right=["max abs diff", "largest value", "relative RMS", "1 - cosine"],
    )
    for layer in report.layers:
        table.add_row(f"layer {layer.layer}", *_cells(layer))
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
                ("next token, transformers", _token(hf)),
                ("next token, Megatron", _token(megatron)),
                ("seconds, transformers", f"{report.seconds.hf:.2f}"),
                ("seconds, Megatron", f"{report.seconds.megatron:.2f}"),
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
        number(distance.max_abs_diff),
        f"{distance.largest:.4g}",
        number(distance.relative_rms_diff),
        number(1 - distance.cosine),
    ]


def _token(token: NextToken) -> Text:
    return Text(f"{token.text!r} ({token.id})")
