"""The parallel layout of a planned model, or which it can have, as megatron-core and providers say.

There is no rule here. A layout is tried: the provider is finalized with it, and one layer of each
kind is built on a small imagined cluster. The nearest legal sizes are found by trying, too, one
after the other: each beside those that were legal, or found, before it. What was tried is kept.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

from megatron.bridge.errors import ConfigError, InputError, PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.without_values import build_without_values
from megatron.bridge.operations.inspection.cluster_layout import (
    Blueprint,
    ParallelLayout,
    configured,
    lay_out,
    on_rank,
    without_advice,
)
from megatron.bridge.operations.inspection.hf_report import HFReport
from megatron.bridge.progress import Progress
from megatron.bridge.runtime.parallel_sizes import FIELDS, ParallelSizes
from megatron.bridge.text.quoting import quoted

type Refusals = Callable[[ParallelSizes], list[str]]

REFUSED = (AssertionError, ValueError, RuntimeError, ConfigError)
"""What megatron-core and the providers raise for sizes that they do not take."""

_BESIDE = {"vpp": ("pp",), "cp": ("tp",)}
"""Sizes of which others say which are legal."""

_LARGEST = 1024
"""Where the search for legal sizes ends."""

_SEARCH_SECONDS = 4.0
"""Processor time of the search in either direction: what is not found then is not said."""


def layout_of(
    report: HFReport,
    sizes: ParallelSizes,
    *,
    without: Collection[str] = (),
    progress: Progress | None = None,
) -> ParallelLayout:
    """What every rank holds of a model with a proven plan.

    Args:
        report: of the model.
        sizes: of the cluster.
        without: parts to leave out, of the `optional_parts` of its bridge; it has all others that
            the plan has.
        progress: told of the stages.

    Raises:
        InputError: a part is none that can be left out.
        PlanError: the model cannot have these sizes; the message names all that are illegal, each
            with the nearest legal ones.
    """
    plan, settings, bridge = _proven(report, without)

    def fields(*more: str) -> Mapping[str, Any]:
        return bridge.settings_for_layout(settings, plan, (*without, *more))

    def model(fields: Mapping[str, Any]) -> Blueprint:
        return Blueprint(bridge, partial(bridge.provider_of, fields))

    whole = fields()
    try:
        return lay_out(model(whole), sizes, progress)
    except REFUSED as error:
        lesser = {part: fields(part) for part in bridge.optional_parts}
        differing = {part: model(one) for part, one in lesser.items() if one != whole}
        raise layout_error(model(whole), sizes, error, differing) from error


def blueprint_of(report: HFReport, without: Collection[str] = ()) -> Blueprint:
    """The model of a proven plan, without a layout.

    Args:
        report: of the model.
        without: parts to leave out, see `layout_of`.

    Raises:
        InputError: a part is none that can be left out.
    """
    plan, settings, bridge = _proven(report, without)
    fields = bridge.settings_for_layout(settings, plan, without)
    return Blueprint(bridge, partial(bridge.provider_of, fields))


def _proven(
    report: HFReport, without: Collection[str]
) -> tuple[ConversionPlan, Mapping[str, Any], MegatronModelBridge]:
    if report.plan is None or report.settings is None:
        raise ValueError(f"{report.source}: the conversion is not proven")
    bridge = bridge_for(report.architecture)
    for part in without:
        if part not in bridge.optional_parts:
            known = ", ".join(bridge.optional_parts) or "it has none"
            raise InputError(
                f"--without {quoted(part)} is not a part that a {report.architecture} may be built "
                f"without: {known}"
            )
    return report.plan, report.settings, bridge


def layout_error(
    model: Blueprint,
    sizes: ParallelSizes,
    error: Exception,
    without: Mapping[str, Blueprint],
) -> PlanError:
    """Every size that is illegal by itself; if there is none, what megatron-core said.

    Args:
        model: the one that was to be laid out.
        sizes: of the cluster.
        error: what the attempt ended with, one of REFUSED.
        without: the same model without one of its optional parts, by the name of the part.
    """
    refusals = partial(_refusals, model)
    with without_advice():
        problems, mended = _size_problems(sizes, refusals)
        for part, lesser in without.items():
            if problems and not _refusals(lesser, sizes):
                words = model.bridge.optional_parts[part]
                problems[-1] += f"; legal without {words}: --without {part}"
        problems += _world_problems(sizes, mended)
    heading = f"the model cannot be laid out by {str(sizes) or 'any layout'}"
    return PlanError(problems or [_reason(error)], heading=heading)


def _size_problems(sizes: ParallelSizes, refusals: Refusals) -> tuple[list[str], ParallelSizes]:
    """Each size that is refused beside those before it, and legal sizes in the place of all."""
    mended, problems = ParallelSizes(), []
    if refusals(mended):
        return [], sizes  # it is no size's fault
    for option, size in sizes.given().items():
        asked = mended.with_size(option, size)
        if not (reasons := refusals(asked)):
            mended = asked
            continue
        nearest = _nearest(asked, option, refusals)
        if nearest:
            legal = f"the nearest legal: {_or(nearest)}"
            mended = mended.with_size(option, nearest[0])
        else:
            legal = "legal without it"
            for other in _BESIDE.get(option, ()):
                found = _nearest(asked, other, refusals)
                if larger := [n for n in found if n > getattr(asked, other)]:
                    legal += f", or with --{other} {larger[0]}"
        changed = _changed(sizes, mended, _BESIDE.get(option, ()))
        problems.append(f"--{option} {size}: {'; '.join(reasons)} ({changed}{legal})")
    return problems, mended


def _changed(asked: ParallelSizes, mended: ParallelSizes, options: Iterable[str]) -> str:
    """Which of these sizes a proposal needs to be others than were asked for."""
    changed = [
        f"without --{name}" if size is None else f"with --{name} {size}"
        for name in options
        if (size := getattr(mended, name)) != getattr(asked, name)
    ]
    return "".join(f"{one}, " for one in changed)


def _nearest(sizes: ParallelSizes, option: str, refusals: Refusals) -> list[int]:
    """The next legal size below and above, up to twice the given one, as far as time allows."""
    size = getattr(sizes, option)
    found = []
    below = range(min(size - 1, _LARGEST), 0, -1)
    above = range(size + 1, min(2 * size, _LARGEST) + 1)
    for candidates in (below, above):
        end = time.process_time() + _SEARCH_SECONDS
        for one in candidates:
            if time.process_time() > end:
                break
            if not refusals(sizes.with_size(option, one)):
                found.append(one)
                break
    return found


def _world_problems(asked: ParallelSizes, mended: ParallelSizes) -> list[str]:
    """Why there cannot be so many ranks, once all other sizes are legal."""
    least, ranks = mended.ranks_per_replica, asked.world_size
    if ranks is None or ranks % least == 0:
        return []
    below = ranks // least * least
    nearest = [size for size in (below, below + least) if size]
    holders = f"{mended.dense_ranks} ranks hold the model (tp x pp x cp)"
    if mended.expert_ranks != mended.dense_ranks:
        holders += f", {mended.expert_ranks} its experts (etp x ep x pp)"
    problem = f"--world-size {ranks}: not a multiple of what is needed: {holders}"
    changed = _changed(asked, mended, (name for name in FIELDS if name != "vpp"))
    return [f"{problem} ({changed}the nearest legal: {_or(nearest)})"]


@cache
def _refusals(model: Blueprint, sizes: ParallelSizes) -> list[str]:
    """Why the model cannot be built with these sizes, on as many ranks as they need."""
    provider = configured(model, sizes)
    try:
        provider.finalize()
    except ConfigError as error:
        return list(error.problems) or [_reason(error).removeprefix(f"{type(provider).__name__}: ")]
    except REFUSED as error:
        return [_reason(error)]
    # The rules of the pipeline are those above; how a layer is split is the same on all stages.
    return _refusals_of_layers(model, replace(sizes, pp=1, vpp=None, world_size=None))


@cache
def _refusals_of_layers(model: Blueprint, sizes: ParallelSizes) -> list[str]:
    try:
        with on_rank(0, sizes):
            small = model.bridge.small(configured(model, sizes))
            build_without_values(small, lambda: [small.provide()])
    except REFUSED as error:
        return [_reason(error)]
    return []


def _or(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sizes))


def _reason(error: Exception) -> str:
    """The message without the module that was being built; for a bare assertion, the assertion."""
    message = " ".join(str(error).partition(" when instantiating ")[0].split())
    if isinstance(error, ConfigError):
        return message
    bare = not message or message.startswith("when instantiating")
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"megatron-core refuses: {line if bare else message}"
