"""A refit of a released model from hundreds of ranks: what is said of it, and what it takes."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest

import released_configs as released
from megatron.bridge.cli import main
from megatron.bridge.exchange.demand import Demand, Wanted
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.exchange.route import Routes
from megatron.bridge.exchange.windows import WINDOW_BYTES, schedule
from megatron.bridge.operations.inspection.rank_shards import shards_of_ranks
from megatron.bridge.operations.inspection.refit_forecast import EngineLayout, wanted_boxes
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from released_layouts import DrawnLayout, plan_of

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "refit.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "qwen3.5-397b").mkdir()
    config = folder / "qwen3.5-397b" / "config.json"
    config.write_text(json.dumps(released.QWEN3_5_397B_A17B))
    return folder


def test_the_run_of_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    page = HOWTO.read_text("utf-8")
    found = re.search(r"\$ megatron-bridge (plan .*--refit.*)\n  \.\.\.\n([^`]*)```", page)
    assert found is not None
    assert main(found[1].split()) == 0
    assert capsys.readouterr().out.endswith(found[2])


def test_what_preparing_a_rank_takes() -> None:
    """Of 256 ranks, for engines of TP16, beside the plan and the views."""
    sizes = ParallelSizes(8, 4, None, 1, 32, 1, 256)
    layout = DrawnLayout("397B", 60, sizes, {"mtp_num_layers": None})
    plan = plan_of(layout)
    held = shards_of_ranks(layout.blueprint, sizes)
    engine = shards_of_ranks(layout.blueprint, EngineLayout(tp=16).sizes)
    wishes = [
        tuple(Demand(name, box) for name, boxes in wanted_boxes(plan, own).items() for box in boxes)
        for own in engine
    ]
    tracemalloc.start()
    routes = Routes(plan, Roster(tuple(held), ()), Wanted(tuple(wishes * 16)))
    moves = routes.sends(77), routes.receives(77)
    windows = schedule(plan, routes.wanted.names(plan), moves, WINDOW_BYTES, 256, lambda own: own)
    by_window = [windows.by_window(own) for own in moves]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(sum(map(len, own)) > 90_000 for own in by_window)
    assert peak < 200e6
