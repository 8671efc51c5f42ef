"""The parallel layout of a planned model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.operations.inspection.cluster_layout import (
    ParallelLayout,
    PlannedModel,
    lay_out,
)
from megatron.bridge.operations.inspection.cluster_legality import REFUSED, why_illegal
from megatron.bridge.operations.inspection.cluster_request import ParallelRequest
from megatron.bridge.operations.inspection.hf_report import HFReport
from megatron.bridge.progress import Progress


def plan_layout(
    report: HFReport,
    request: ParallelRequest,
    *,
    without: Collection[str] = (),
    progress: Progress | None = None,
) -> ParallelLayout:
    """What every rank holds of a model with a proven plan.

    without: parts to leave out, of the `optional_parts` of its bridge; it has all others that the
    plan has. progress: of the stages. Raises PlanError for sizes that the model cannot have, all of
    them with the nearest that it can.
    """
    plan, settings = report.plan, report.settings
    if plan is None or settings is None:
        raise ValueError(f"{report.source}: the conversion is not proven")
    bridge = bridge_for(report.architecture)

    def fields(*more: str) -> Mapping[str, Any]:
        return bridge.settings_for_layout(settings, plan, (*without, *more))

    def model(fields: Mapping[str, Any]) -> PlannedModel:
        return PlannedModel(bridge, partial(bridge.provider_of, fields))

    whole = fields()
    try:
        return lay_out(model(whole), request, progress)
    except REFUSED as error:
        lesser = {part: fields(part) for part in bridge.optional_parts}
        differing = {part: model(one) for part, one in lesser.items() if one != whole}
        raise why_illegal(model(whole), request, error, differing) from error
