"""The parallel layout of a planned model, or which it can have, as megatron-core and providers say.

There is no rule here. A layout is tried: the provider is finalized with it, and one layer of each
kind is built on a small imagined cluster. The nearest legal sizes are found by trying, too; what
was tried is kept.
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
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.text.quoting import quoted

type Refusals = Callable[[ParallelSizes], list[str]]

REFUSED = (AssertionError, ValueError, RuntimeError, ConfigError)
"""What megatron-core and the providers raise for sizes that they do not take."""

_BESIDE = {"vpp": ("pp",)}
"""Sizes that mean something only beside others."""

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
    plan, settings = report.plan, report.settings
    if plan is None or settings is None:
        raise ValueError(f"{report.source}: the conversion is not proven")
    bridge = bridge_for(report.architecture)
    for part in without:
        if part not in bridge.optional_parts:
            known = ", ".join(bridge.optional_parts) or "it has none"
            raise InputError(
                f"--without {quoted(part)} is not a part that a {report.architecture} may be built "
                f"without: {known}"
            )

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
        problems = _size_problems(sizes, refusals)
        for part, lesser in without.items():
            if problems and not _refusals(lesser, sizes):
                words = model.bridge.optional_parts[part]
                problems[-1] += f"; legal without {words}: --without {part}"
        problems += _world_problems(sizes)
    heading = f"the model cannot be laid out by {str(sizes) or 'any layout'}"
    return PlanError(problems or [_reason(error)], heading=heading)


def _size_problems(sizes: ParallelSizes, refusals: Refusals) -> list[str]:
    """Each size that is refused by itself."""
    alone = {option: sizes.only(option, *_BESIDE.get(option, ())) for option in sizes.given()}
    found = (_problem(option, one, refusals) for option, one in alone.items())
    return [problem for problem in found if problem is not None]


def _problem(option: str, sizes: ParallelSizes, refusals: Refusals) -> str | None:
    """Why a size is refused, and the nearest that are not; None if it is not this size's fault."""
    reasons = refusals(sizes)
    if not reasons or refusals(sizes.without(option)):
        return None
    if nearest := _nearest(sizes, option, refusals):
        legal = f"the nearest legal: {_or(nearest)}"
    else:
        legal = "legal without it"
        for other in _BESIDE.get(option, ()):
            if larger := [n for n in _nearest(sizes, other, refusals) if n > getattr(sizes, other)]:
                legal += f", or with --{other} {larger[0]}"
    return f"--{option} {getattr(sizes, option)}: {'; '.join(reasons)} ({legal})"


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


def _world_problems(sizes: ParallelSizes) -> list[str]:
    if sizes.world_size is None or _forms_groups(sizes):
        return []
    least = sizes.ranks_per_replica
    below = sizes.ranks // least * least
    nearest = [size for size in (below, below + least) if size]
    holders = f"{sizes.dense_ranks} ranks hold the model (tp x pp x cp)"
    if sizes.expert_ranks != sizes.dense_ranks:
        holders += f", {sizes.expert_ranks} its experts (etp x ep x pp)"
    problem = f"--world-size {sizes.ranks}: not a multiple of what is needed: {holders}"
    return [f"{problem} (the nearest legal: {_or(nearest)})"]


def _forms_groups(sizes: ParallelSizes) -> bool:
    """Whether megatron-core makes process groups of these sizes."""
    try:
        with on_rank(0, sizes):
            return True
    except REFUSED:
        return False


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
