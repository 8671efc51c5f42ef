"""Export and refit of models that are split over ranks: all bit for bit that of the files.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import exchange_refusals
from exchange_layouts import MODELS, OF_EIGHT, OF_FOUR, OF_TWO, QUICK, built, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.exchange.demand import Demand
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.exchange.route import Routes
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.operations.inspection.cluster_legality import layout_of
from megatron.bridge.operations.inspection.forecast import forecast_import
from megatron.bridge.operations.inspection.refit_forecast import (
    Spread,
    forecast_refit,
    plan_refit,
)
from megatron.bridge.operations.inspection.refit_route import EngineLayout
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.boxes import Box, full_box, slices
from model_folders import read_tensors
from refit_targets import changed, wrong

WORLD = 4
WINDOW = 250_000
"""Bytes: less than the largest tensors have."""

PLANNED = {
    "tensor": (ParallelSizes(tp=2, world_size=4), EngineLayout(replicas=3)),
    "expert_tensors": (ParallelSizes(tp=4, ep=2, etp=2), EngineLayout(tp=2, ep=2, replicas=2)),
}
"""Cases whose refit is planned ahead: the trainer's sizes, and an engine."""

NO_ROUTES: Mapping[str, Routes] = {}

type Case = tuple[str, int, dict[str, Any]]


def differences(given: dict[str, torch.Tensor], files: dict[str, torch.Tensor]) -> list[str]:
    """Of what is given, what is not the file's."""
    return [
        name
        for name, tensor in given.items()
        if tensor.dtype != files[name].dtype
        or tensor.shape != files[name].shape
        or not torch.equal(tensor.view(torch.uint8), files[name].view(torch.uint8))
    ]


def wanted_box(name: str, shape: tuple[int, ...], rank: int) -> Box | None:
    """An uneven part of a tensor, along an axis that its name chooses; some tensors whole."""
    number = int.from_bytes(sha256(name.encode()).digest()[:4])
    if not shape or number % 5 == 0:
        return full_box(shape)
    axis = number % len(shape)
    size = shape[axis]
    cuts = [0, size // 5, size // 2, size * 4 // 5, *[size] * 5]
    if cuts[rank] == cuts[rank + 1]:
        return None
    box = list(full_box(shape))
    box[axis] = cuts[rank], cuts[rank + 1]
    return tuple(box)


def landings(files: dict[str, torch.Tensor], names: list[str], rank: int) -> list[Landing]:
    """What a rank wants, in memory that every other time has the axes turned round."""
    found = []
    for number, name in enumerate(names):
        box = wanted_box(name, tuple(files[name].shape), rank)
        if box is None:
            continue
        out = torch.zeros_like(files[name][slices(box)])
        if number % 2 and out.dim() > 1:
            out = torch.zeros_like(out.mT.contiguous()).mT
        found.append(Landing(name, box, out))
    return found


def exported(bridge: AutoBridge, model: Any, files: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Names and differences of what this rank is given."""
    found: dict[str, Any] = {}
    for to in ("all", "spread", 1):
        given = dict(bridge.export_hf_weights(model, to=to, window_bytes=WINDOW))
        found[str(to)] = list(given), differences(given, files)
    given = dict(bridge.export_hf_weights(model))
    return found | {"one window": (list(given), differences(given, files))}


def refitted(
    bridge: AutoBridge, model: Any, targets: list[Landing], files: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What two refits leave in memory of this rank."""
    refit = bridge.refit(model, targets, window_bytes=WINDOW)
    before = refit.version, refit.is_whole
    report = refit()
    found = {"wrong": wrong(targets, files), "wanted": len(targets), "report": report}
    for target in targets:
        target.out.zero_()
    again = refit()
    return found | {"wrong again": wrong(targets, files), "versions": [before, again.version]}


def refitted_by_changes(bridge: AutoBridge, model: Any, targets: list[Landing]) -> dict[str, Any]:
    """After changes of the model: what differs from what it is exported as, and what was sent."""
    refit = bridge.refit(model, targets, window_bytes=WINDOW, delta=True)
    found = []
    for number, part in enumerate((0.0, 0.03, 0.6, 0.03)):
        changed(model, part, 31 * number)
        refit()
        changed(model, part, 37 * number)
        if number == 3 and torch.distributed.get_rank() == 1:
            for target in targets:  # somebody has been at what was received
                target.out.zero_()
        report = refit()
        model_now = dict(bridge.export_hf_weights(model))
        found.append((wrong(targets, model_now), report))
    return {"steps": found}


def planned(folder: Path, name: str) -> Routes:
    """The route of a case from its config and its sizes alone."""
    trainer, engine = PLANNED[name]
    report = forecast_import(str(folder / QUICK[name][0]))
    without = ("mtp",) if "mtp" in bridge_for(report.architecture).optional_parts else ()
    report = replace(report, layout=layout_of(report, trainer, without=without))
    return plan_refit(report, engine, without)


def filled_like_an_engine(
    bridge: AutoBridge, model: Any, wanted: Sequence[Demand], files: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What a refit of the planned boxes leaves in memory of this rank."""
    targets = [
        Landing(name, box, torch.zeros_like(files[name][slices(box)])) for name, box in wanted
    ]
    report = bridge.refit(model, targets, window_bytes=WINDOW)()
    return {"wrong": wrong(targets, files), "wanted": len(targets), "report": report}


def run_case(folder: Path, rank: int, case: Case, wanted: Any) -> dict[str, Any]:
    model_name, _, fields = case
    bridge = AutoBridge.from_hf_pretrained(folder / model_name)
    model = built(bridge, MODELS[model_name][2] | fields)
    files = read_tensors(folder / model_name)
    export = exported(bridge, model, files)
    targets = landings(files, export["all"][0], rank)
    found = {"export": export, "refit": refitted(bridge, model, targets, files)}
    if wanted is not None:
        found["planned"] = filled_like_an_engine(bridge, model, wanted[rank], files)
    return found | {"delta": refitted_by_changes(bridge, model, targets)}


def run_refusals(folder: Path, rank: int) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(folder / "hybrid")
    model, files = built(bridge, layout(tp=2, pp=2)), read_tensors(folder / "hybrid")
    said = exchange_refusals.refusals(bridge, model, folder, rank)
    bad = exchange_refusals.under_other_defaults(bridge, model, lambda one: differences(one, files))
    return {"said": said, "wrong": bad, "collectives": counted_collectives(bridge, model)}


def counted_collectives(bridge: AutoBridge, model: Any) -> list[tuple[int, int]]:
    """How many each refit says that it took, and how many there were."""
    found = []
    for transport in ("point-to-point", "all-to-all"):
        options: dict[str, Any] = {"window_bytes": WINDOW, "delta": True, "transport": transport}
        refit = bridge.refit(model, {}, **options)
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                calls: list[str] = []
                for name in ("all_reduce", "all_gather", "all_to_all_single"):
                    patch.setattr(torch.distributed, name, _counted(name, calls))
                report = refit()
            found.append((report.collectives, len(calls)))
    return found


def _counted(name: str, calls: list[str]) -> Any:
    collective = getattr(torch.distributed, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return collective(*args, **options)

    return counted


def worker(rank: int, folder: str, cases: dict[str, Case], wanted: dict[str, Any]) -> None:
    found = {
        name: run_case(Path(folder), rank, case, wanted.get(name)) for name, case in cases.items()
    }
    if cases == QUICK:
        found["refusals"] = run_refusals(Path(folder), rank)
    torch.save(found, f"{folder}/found{rank}.pt")
    destroy_process_groups()


def found_by_ranks(
    folder: Path, cases: dict[str, Case], world: int, routes: Mapping[str, Routes] = NO_ROUTES
) -> list[dict[str, Any]]:
    """What each rank found, case by case."""
    models = {model for model, _, _ in cases.values()}
    make_models(folder, {model for model in models if not (folder / model).exists()})
    wanted = {name: route.wanted.by_rank for name, route in routes.items()}
    run_ranks(worker, str(folder), cases, wanted, world=world, seconds=900)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    make_models(folder, {QUICK[name][0] for name in PLANNED})
    return folder


@pytest.fixture(scope="module")
def routes(four: Path) -> dict[str, Routes]:
    return {name: planned(four, name) for name in PLANNED}


@pytest.fixture(scope="module")
def found(four: Path, routes: dict[str, Routes]) -> list[dict[str, Any]]:
    return found_by_ranks(four, QUICK, WORLD, routes)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("others_of_four"), OF_FOUR, WORLD)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("two"), OF_TWO, 2)


@pytest.fixture(scope="module")
def of_eight(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("eight"), OF_EIGHT, 8)


def check_export(case: str, found: list[dict[str, Any]]) -> None:
    whole = found[0][case]["export"]["all"][0]
    assert len(whole) > 20
    for rank, one in enumerate(found):
        assert [wrong for _, wrong in one[case]["export"].values()] == [[]] * 4
        assert one[case]["export"]["all"][0] == one[case]["export"]["one window"][0] == whole
        assert one[case]["export"]["1"][0] == (whole if rank == 1 else [])
    spread = [one[case]["export"]["spread"][0] for one in found]
    assert sorted(name for names in spread for name in names) == sorted(whole)
    assert all(spread)


def check_refit(case: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one[case]["refit"]["wanted"] > 5
        assert one[case]["refit"]["wrong"] == one[case]["refit"]["wrong again"] == []
        assert one[case]["refit"]["versions"] == [(0, True), 2]
        report = one[case]["refit"]["report"]
        assert report.buffer_bytes <= 4 * WINDOW


def check_changes(case: str, found: list[dict[str, Any]]) -> None:
    steps = [one[case]["delta"]["steps"] for one in found]
    assert [[wrong for wrong, _ in step] for step in steps] == [[[]] * 4] * len(found)
    reports = [[report for _, report in step] for step in steps]
    sent = none, few, many, touched = [
        sum(one.sent_bytes for one in step) for step in zip(*reports, strict=True)
    ]
    # Replicas have all that they want: nobody sends, and what somebody was at is copied again.
    is_sent = any(sent)
    assert [[one.is_delta for one in own] for own in reports] == [
        [True, True, True, not is_sent]
    ] * len(found)
    if is_sent:
        assert none < few < many < 1.1 * touched
        assert few < touched / 4


@pytest.mark.parametrize("case", QUICK)
def test_four_ranks(case: str, found: list[dict[str, Any]]) -> None:
    check_export(case, found)
    check_refit(case, found)
    assert all(one[case]["refit"]["report"].windows > 3 for one in found)


@pytest.mark.parametrize("case", PLANNED)
def test_a_refit_moves_what_was_planned(
    case: str, found: list[dict[str, Any]], routes: dict[str, Routes]
) -> None:
    """Planned from a config, without a process; the refit counts its own views."""
    expected = forecast_refit(routes[case], PLANNED[case][1], window_bytes=WINDOW)
    engine = [rank for rank, own in enumerate(routes[case].wanted.by_rank) if own]
    assert len(engine) == PLANNED[case][1].ranks
    reports = [one[case]["planned"]["report"] for one in found]
    assert [one[case]["planned"]["wrong"] for one in found] == [[]] * WORLD
    assert all(found[rank][case]["planned"]["wanted"] > 20 for rank in engine)
    assert {report.windows for report in reports} == {expected.windows}
    assert expected.windows > 3
    assert expected.sent == spread([report.sent_bytes for report in reports])
    assert expected.received == spread([reports[rank].received_bytes for rank in engine])
    assert expected.buffers == spread([report.buffer_bytes for report in reports])
    assert expected.moved_bytes == sum(report.sent_bytes for report in reports) > 0
    assert expected.own_bytes == sum(report.own_bytes for report in reports) > 0
    assert 0 < expected.limit_bytes <= max(expected.sent.most, expected.received.most)


def spread(found: list[int]) -> Spread:
    return Spread(len(found), min(found), sum(found) // len(found), max(found))


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_FOUR)
def test_other_layouts_of_four_ranks(case: str, of_four: list[dict[str, Any]]) -> None:
    check_export(case, of_four)
    check_refit(case, of_four)
    check_changes(case, of_four)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_TWO)
def test_two_ranks(case: str, of_two: list[dict[str, Any]]) -> None:
    check_export(case, of_two)
    check_refit(case, of_two)
    check_changes(case, of_two)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_EIGHT)
def test_eight_ranks(case: str, of_eight: list[dict[str, Any]]) -> None:
    check_export(case, of_eight)
    check_refit(case, of_eight)
    check_changes(case, of_eight)


@pytest.mark.parametrize("case", QUICK)
def test_only_what_changed_is_sent(case: str, found: list[dict[str, Any]]) -> None:
    check_changes(case, found)


@pytest.mark.parametrize("case", exchange_refusals.SAID)
def test_what_one_rank_does_is_refused_on_all(case: str, found: list[dict[str, Any]]) -> None:
    of_odd, of_others = exchange_refusals.SAID[case]
    for rank, one in enumerate(found):
        said = one["refusals"]["said"]
        assert (of_odd if rank == exchange_refusals.ODD else of_others) in said[case]
        assert not said[case].startswith("after")
        assert said["left"] == ""


def test_under_other_defaults(found: list[dict[str, Any]]) -> None:
    assert [one["refusals"]["wrong"] for one in found] == [[]] * WORLD


def test_collectives_are_counted(found: list[dict[str, Any]]) -> None:
    for one in found:
        for said, counted in one["refusals"]["collectives"]:
            assert said == counted > 0
