"""Layouts of the largest released models, drawn at random: legal ones tile the model exactly.

Of illegal ones the advice is taken, and it must work.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from megatron.bridge.errors import PlanError
from megatron.bridge.exchange.roster import Shard, check_held_once
from megatron.bridge.live.local_tensors import LocalTensor, check_planned, local_tensors
from megatron.bridge.operations.inspection.cluster_layout import lay_out, on_rank, without_advice
from megatron.bridge.operations.inspection.cluster_legality import REFUSED, layout_error
from megatron.bridge.runtime.parallel_sizes import DEFAULTS, ParallelSizes
from released_layouts import (
    MODELS,
    DrawnLayout,
    all_layers,
    build,
    draw_legal,
    held,
    main_positions,
    main_shards,
    plan_of,
)

FEW_LAYERS = {"235B": [10, 16, 22], "397B": [8, 16, 20], "2.4T": [8, 12, 20]}
"""Of which stages can be made in many ways. All widths are as released."""


def assert_tiles_the_model(layout: DrawnLayout) -> None:
    """The main replicas of all ranks are the plan's tensors, each element once."""
    plan = plan_of(layout)
    shards = list(main_shards(layout))
    shapes = {shard.key: shard.key_shape for shard in shards}
    assert shapes == {key: spec.shape for key, spec in plan.megatron.items()}, layout
    check_held_once(plan.megatron, shards)


@pytest.mark.parametrize("model", MODELS)
def test_a_layout_tiles_the_model(model: str) -> None:
    draw = random.Random(f"few {model}")
    assert_tiles_the_model(draw_legal(draw, model, FEW_LAYERS[model][0], most_ranks=8))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(60))
def test_layouts_tile_the_model(model: str, seed: int) -> None:
    """With the first layers of the model: those after them are alike."""
    draw = random.Random(f"{model} {seed}")
    assert_tiles_the_model(draw_legal(draw, model, draw.choice(FEW_LAYERS[model])))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(7))
def test_layouts_tile_the_whole_model(model: str, seed: int) -> None:
    draw = random.Random(f"whole {model} {seed}")
    assert_tiles_the_model(draw_legal(draw, model, all_layers(model), most_ranks=24))


@pytest.mark.parametrize(
    "model", ["235B", *(pytest.param(one, marks=pytest.mark.slow) for one in ("397B", "2.4T"))]
)
def test_layers_and_experts_that_are_not_built_hold_what_is_said(model: str) -> None:
    """What is said of ranks of which one layer of each kind is built, against all of each."""
    sizes = ParallelSizes(tp=2, pp=2, ep=16, etp=1)
    layout = DrawnLayout(model, FEW_LAYERS[model][0], sizes, {"sequence_parallel": True})
    plan = plan_of(layout)
    with without_advice():
        for position in main_positions(sizes)[-1:]:
            with on_rank(position.rank, sizes):
                said = sorted(map(_told, held(layout)))
            with on_rank(position.rank, sizes):
                built = local_tensors(build(layout))
            assert said == sorted(map(_told, built))
            check_planned(plan, built)


def _told(local: LocalTensor) -> tuple[object, ...]:
    shard = Shard.of(local)
    return shard.key, shard.box, shard.key_shape, shard.dtype, local.is_main


def test_a_shard_too_few_or_too_many_is_seen() -> None:
    layout = draw_legal(random.Random(3), "235B", 10, most_ranks=4)
    plan, shards = plan_of(layout), list(main_shards(layout))
    check_held_once(plan.megatron, shards)
    for wrong in (shards[1:], [*shards, shards[-1]]):
        with pytest.raises(PlanError, match=r"is not filled|is filled 2 times|no rank holds it"):
            check_held_once(plan.megatron, wrong)


# --- illegal ones ---


def drawn_sizes(draw: random.Random) -> ParallelSizes:
    """Of which few are legal."""
    size = draw.choice
    return ParallelSizes(
        tp=size([1, 1, 2, 3, 4, 5, 8, 16, 32]),
        pp=size([1, 1, 2, 3, 4, 5, 7]),
        vpp=size([None, None, None, 2, 3, 5]),
        cp=size([1, 1, 1, 2, 3, 8]),
        ep=size([1, 1, 2, 3, 4, 7, 32, 200]),
        etp=size([None, None, 1, 2, 3, 5, 7]),
        world_size=size([None, None, draw.randint(1, 64)]),
    )


def advised(sizes: ParallelSizes, problems: tuple[str, ...], choice: int) -> ParallelSizes:
    """The sizes with each problem's advice taken; `choice` is 0 or -1, of the nearest legal."""
    for problem in problems:
        found = re.match(r"--([a-z-]+) (\d+): .+\((.*legal.*)\)", problem)
        assert found, problem
        option, value, advice = found[1].replace("-", "_"), int(found[2]), found[3]
        assert getattr(sizes, option) == value
        if nearest := re.search(r"the nearest legal: ([\d or]+)", advice):
            sizes = sizes.with_size(option, int(nearest[1].split(" or ")[choice]))
        else:
            assert "legal without it" in advice
            sizes = sizes.with_size(option, getattr(DEFAULTS, option))
    return sizes


def assert_advice_works(model: str, seed: int) -> bool:
    """Whether the drawn sizes are illegal; if they are, what is advised is not."""
    draw = random.Random(f"illegal {model} {seed}")
    sizes = drawn_sizes(draw)
    mtp = 1 if model != "235B" and draw.random() < 0.5 else None
    layout = DrawnLayout(model, draw.choice([6, 8, 12]), sizes, {"mtp_num_layers": mtp})
    blueprint = layout.blueprint
    try:
        lay_out(blueprint, sizes)
    except REFUSED as error:
        without = {} if mtp is None else {"mtp": replace(layout, fields={}).blueprint}
        problems = layout_error(blueprint, sizes, error, without).problems
    else:
        return False
    # The second of two values is one beside which others were not tried.
    for choice in (0, -1) if len(problems) == 1 else (0,):
        lay_out(blueprint, advised(sizes, problems, choice))
    return True


@pytest.mark.parametrize(
    "model",
    [one if one == "235B" else pytest.param(one, marks=pytest.mark.slow) for one in MODELS],
)
def test_advice_works(model: str) -> None:
    assert assert_advice_works(model, 0)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(1, 42))
def test_advice_works_everywhere(model: str, seed: int) -> None:
    assert_advice_works(model, seed)
