"""The parallel layout of a planned model."""

from __future__ import annotations

from megatron.bridge.inspection.hf_folder import HFReport
from megatron.bridge.inspection.parallel_layout import ParallelLayout, lay_out, provider_maker
from megatron.bridge.inspection.parallel_legality import REFUSED, why_illegal
from megatron.bridge.inspection.parallel_request import ParallelRequest
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.qwen_vl.parts import BESIDE_VISION
from megatron.bridge.progress import Progress


def plan_layout(
    model: HFReport,
    request: ParallelRequest,
    *,
    with_mtp: bool,
    progress: Progress | None = None,
) -> ParallelLayout:
    """What every rank holds of a model with a proven plan.

    with_mtp: with its MTP layer, if the plan has one. progress: of the stages. Raises PlanError for
    sizes that the model cannot have, all of them with the nearest that it can.
    """
    if model.plan is None or model.settings is None:
        raise ValueError(f"{model.source}: the conversion is not proven")
    provider = bridge_for(model.architecture).provider
    plain = provider_maker(provider, model.settings, with_mtp=False)
    if with_mtp and any(key.startswith(BESIDE_VISION.mtp) for key in model.plan.megatron):
        make, without_mtp = provider_maker(provider, model.settings, with_mtp=True), plain
    else:
        make, without_mtp = plain, None
    try:
        return lay_out(make, request, progress)
    except REFUSED as error:
        raise why_illegal(make, request, error, without_mtp) from error
