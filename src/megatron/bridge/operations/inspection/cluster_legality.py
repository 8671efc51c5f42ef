"""Which parallel layouts a model can have, as its provider and megatron-core say.

There is no rule here. A layout is tried: the provider is finalized with it, and one layer of each
kind is built on a small imagined cluster. The nearest legal sizes are found by trying, too.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from megatron.bridge.errors import ConfigError, PlanError
from megatron.bridge.operations.inspection.cluster_layout import (
    PlannedModel,
    configured,
    on_rank,
    without_advice,
)
from megatron.bridge.operations.inspection.cluster_request import ParallelRequest

type Refusals = Callable[[ParallelRequest], list[str]]

REFUSED = (AssertionError, ValueError, RuntimeError, ConfigError)
"""What megatron-core and the providers raise for sizes that they do not take."""

_BESIDE = {"vpp": ("pp",)}
"""Sizes that mean something only beside others."""

_LARGEST = 1024
"""Where the search for legal sizes ends."""

_SEARCH_SECONDS = 4.0
"""Of the processor, and in either direction: what is not found then is not said."""


def why_illegal(
    model: PlannedModel,
    request: ParallelRequest,
    error: Exception,
    without: Mapping[str, PlannedModel],
) -> PlanError:
    """Every size that is illegal by itself; if there is none, what megatron-core said.

    error: what the attempt to lay out the model ended with, one of REFUSED. without: the same model
    without one of its optional parts, by the name of the part.
    """

    def refusals(tried: ParallelRequest) -> list[str]:
        return _refusals(model, tried)

    with without_advice():
        problems = _size_problems(request, refusals)
        for part, lesser in without.items():
            if problems and not _refusals(lesser, request):
                words = model.bridge.optional_parts[part]
                problems[-1] += f"; legal without {words}: --no-{part}"
        problems += _world_problems(request)
    heading = f"the model cannot be laid out by {str(request) or 'any layout'}"
    return PlanError(problems or [_reason(error)], heading=heading)


def _size_problems(request: ParallelRequest, refusals: Refusals) -> list[str]:
    """Each size that is refused by itself."""
    alone = {option: request.only(option, *_BESIDE.get(option, ())) for option in request.given()}
    found = (_problem(option, one, refusals) for option, one in alone.items())
    return [problem for problem in found if problem is not None]


def _problem(option: str, request: ParallelRequest, refusals: Refusals) -> str | None:
    """Why a size is refused, and the nearest that are not; None if it is not this size's fault."""
    reasons = refusals(request)
    if not reasons or refusals(request.without(option)):
        return None
    if nearest := _nearest(request, option, refusals):
        legal = f"the nearest legal: {_or(nearest)}"
    else:
        legal = "legal without it"
        for other in _BESIDE.get(option, ()):
            if larger := [
                n for n in _nearest(request, other, refusals) if n > getattr(request, other)
            ]:
                legal += f", or with --{other} {larger[0]}"
    return f"--{option} {getattr(request, option)}: {'; '.join(reasons)} ({legal})"


def _nearest(request: ParallelRequest, option: str, refusals: Refusals) -> list[int]:
    """The next legal size below and above, up to twice the given one, as far as time allows."""
    size = getattr(request, option)
    found = []
    below = range(min(size - 1, _LARGEST), 0, -1)
    above = range(size + 1, min(2 * size, _LARGEST) + 1)
    for candidates in (below, above):
        end = time.process_time() + _SEARCH_SECONDS
        for one in candidates:
            if time.process_time() > end:
                break
            if not refusals(request.with_size(option, one)):
                found.append(one)
                break
    return found


def _world_problems(request: ParallelRequest) -> list[str]:
    if request.world_size is None or _forms_groups(request):
        return []
    least = request.smallest_world
    below = request.ranks // least * least
    nearest = [size for size in (below, below + least) if size]
    holders = f"{request.dense_ranks} ranks hold the model (tp x pp x cp)"
    if request.expert_ranks != request.dense_ranks:
        holders += f", {request.expert_ranks} its experts (etp x ep x pp)"
    problem = f"--world-size {request.ranks}: no multiple of what is needed: {holders}"
    return [f"{problem} (the nearest legal: {_or(nearest)})"]


def _forms_groups(request: ParallelRequest) -> bool:
    """Whether megatron-core makes process groups of these sizes."""
    try:
        with on_rank(0, request):
            return True
    except REFUSED:
        return False


def _refusals(model: PlannedModel, request: ParallelRequest) -> list[str]:
    """Why the model cannot be built with these sizes, on as many ranks as they need."""
    provider = configured(model, request)
    if problems := provider.problems():
        return problems
    try:
        provider.finalize()
        # The rules of the pipeline are those above; how a layer is split is the same on all stages.
        single = replace(request, pp=1, vpp=None, world_size=None)
        with on_rank(0, single):
            model.bridge.small(configured(model, single)).provide()
    except REFUSED as error:
        return [_reason(error).removeprefix(f"{type(provider).__name__}: ")]
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
