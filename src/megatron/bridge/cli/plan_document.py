"""`plan` as a JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron.bridge.cli.documents import Document, hf_document, summary_document
from megatron.bridge.errors import PlanError
from megatron.bridge.operations.inspection.forecast import ASSUMED_BYTES_PER_SECOND

if TYPE_CHECKING:
    from megatron.bridge.operations.inspection.cluster_layout import ParallelLayout
    from megatron.bridge.operations.inspection.cluster_request import ParallelRequest
    from megatron.bridge.operations.inspection.forecast import ConversionCost, PlanReport
    from megatron.bridge.operations.inspection.rank_share import RankShare


def plan_document(
    report: PlanReport,
    request: ParallelRequest | None,
    layout: ParallelLayout | None,
    illegal: PlanError | None,
) -> Document:
    """What `inspect` says of the Hugging Face side, the other side, the cost, and every rank."""
    document = hf_document(report.model)
    if illegal is not None:
        document["problems"] += illegal.problems
    return document | {
        "format": report.format,
        "source": report.source,
        "megatron": None if report.megatron is None else summary_document(report.megatron),
        "dropped": list(report.dropped),
        "left_out": list(report.left_out),
        "conversion": None if report.cost is None else _cost(report.cost),
        "parallel": None if request is None else _parallel(request, legal=illegal is None),
        "ranks": [] if layout is None else _ranks(layout),
    }


def _cost(cost: ConversionCost) -> Document:
    return {
        "command": cost.command,
        "read_bytes": cost.reads,
        "written_bytes": cost.writes,
        "download_bytes": cost.download,
        "disk_bytes": cost.disk,
        "memory_bytes": cost.memory,
        "seconds": cost.seconds,
        "assumed_bytes_per_second": ASSUMED_BYTES_PER_SECOND,
    }


def _parallel(request: ParallelRequest, *, legal: bool) -> Document:
    return {**asdict(request), "etp": request.etp or request.tp, "world_size": request.ranks} | {
        "legal": legal
    }


def _ranks(layout: ParallelLayout) -> list[Document]:
    shares = [_share(share) for share in layout.stages]
    return [asdict(position) | shares[position.pp] for position in layout.positions]


def _share(share: RankShare) -> Document:
    return {
        "layers": [list(chunk) for chunk in share.layers],
        "parts": list(share.parts),
        "parameters": share.parameters,
        "weight_bytes": share.weight_bytes,
        "gradient_bytes": share.gradient_bytes,
        "optimizer_bytes": share.optimizer_bytes,
        "largest": {
            "name": share.largest.name,
            "shape": list(share.largest.shape),
            "bytes": share.largest.bytes,
        },
    }
