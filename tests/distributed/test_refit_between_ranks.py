"""Refit between ranks of which some have no part of the model: bit for bit what the files hold.

Four processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as torch_own

from exchange.engine_loaders import engine_of
from exchange_layouts import MODELS, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.exchange.recording import record
from megatron.bridge.runtime.parallel import destroy_process_groups
from model_folders import read_tensors
from refit_targets import Files, changed, is_equal, refused, wrong
from two_of_four_ranks import WINDOW, moved, on_two_ranks, told_by, uneven_targets, unusual
from wrong_on_one_rank import SAID, refusals

WORLD = 4

# case: (model, first rank of the trainer, which has two, fields of the provider)
DISJOINT: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tensor": ("hybrid_mtp", 0, layout(tp=2)),
    "stages": ("vl", 2, layout(pp=2, stages="Et|ttttL")),
}


def to_disjoint(folder: Path, rank: int, case: str) -> dict[str, Any]:
    """Refits from two ranks to the other two: of all, and of changes."""
    name, first, fields = DISJOINT[case]
    bridge, files = AutoBridge.from_hf_pretrained(folder / name), read_tensors(folder / name)
    with on_two_ranks(bridge, first, MODELS[name][2] | fields) as model:
        targets: list[Landing] = []
        if not model:
            targets = uneven_targets(files, sorted(files), (rank - first) % 2)
        refit = bridge.refit(model, targets, window_bytes=WINDOW, delta=True)
        reports, faults = [refit()], [wrong(targets, files)]
        for step in range(3):
            changed(model, 0.03, 7 * step)
            if step == 1:
                unusual(model)
            if step == 2:
                moved(model)
            reports.append(refit())
            faults.append(wrong(targets, told_by(first, bridge, model)))
        found = {
            "faults": faults,
            "wanted": len(targets),
            "reports": reports,
            "version": refit.version,
            "files": len(files),
            "collectives": by_collectives(bridge, model, targets, first),
        }
        if case == "stages":
            found["refusals"] = refusals(bridge, model, files, rank)
            found["out of range"] = [out_of_range(bridge, model, rank, d) for d in (True, False)]
            found["left"] = left_early(bridge, model, rank)
            found["odd exports"] = odd_exports(bridge, model, rank)
        if not model:
            found["outside"] = refused(lambda: built_outside(bridge, fields))
        return found


def by_collectives(
    bridge: AutoBridge, model: list[Any], targets: list[Landing], first: int
) -> tuple[list[str], list[bool]]:
    """Faults after refits by collectives, also of changes."""
    for target in targets:
        target.out.zero_()
    refit = bridge.refit(model, targets, window_bytes=WINDOW, delta=True, transport="all-to-all")
    faults, is_delta = [], []
    for step in range(2):
        is_delta.append(refit().is_delta)
        faults += wrong(targets, told_by(first, bridge, model))
        changed(model, 0.03, 11 * step)
    return faults, is_delta


def built_outside(bridge: AutoBridge, fields: dict[str, Any]) -> None:
    provider = bridge.to_megatron_provider()
    provider.set_fields(fields)
    provider.provide_distributed_model(wrap_with_ddp=False)


# --- a group that is not the world ---

NAMES = {"last": "lm_head.weight", "first": "model.visual.patch_embed.proj.weight"}


def in_a_group(folder: Path, rank: int) -> dict[str, Any]:
    """Ranks 1 and 2 are the trainer's, rank 3 wants something of one of them, rank 0 is outside."""
    name, _, fields = DISJOINT["stages"]
    bridge, files = AutoBridge.from_hf_pretrained(folder / name), read_tensors(folder / name)
    group = dist.new_group([1, 2, 3])
    found = {}
    with on_two_ranks(bridge, 1, fields) as model:
        for where, tensor in NAMES.items() if rank else ():
            for transport in ("all-to-all", "point-to-point"):
                targets = {tensor: torch.zeros_like(files[tensor])} if rank == 3 else {}
                refit = bridge.refit(
                    model, targets, group=group, window_bytes=WINDOW, transport=transport
                )
                report = refit()
                faults = [one for one in targets if not is_equal(targets[one], files[one])]
                found[where, transport] = faults, report.sent_bytes, report.received_bytes
        if rank:
            odd = {"group": group, "window_bytes": WINDOW + rank % 2}
            found["odd"] = refused(lambda: bridge.refit(model, {}, **odd))
        else:
            found["odd"] = refused(lambda: bridge.refit([], {}, group=group))
        if model:
            found["files"] = through_files(bridge, model, folder / "saved", fields, files)
    return found


def out_of_range(bridge: AutoBridge, model: list[Any], rank: int, delta: bool) -> dict[str, Any]:
    """A value that the wire's dtype has no number for stops a refit; without it the next is whole.

    Its rank has the last stage.
    """
    wire: dict[str, Any] = {"dtype": "float16", "round": True}
    told: list[Any] = [list(bridge.export_hf_weights(model, **wire)) if model else None]
    dist.broadcast_object_list(told, 2)
    expected = dict(told[0])
    targets = {name: torch.zeros_like(one) for name, one in expected.items()} if rank == 1 else {}
    refit = bridge.refit(model, targets, window_bytes=WINDOW, delta=delta, **wire)
    refit()
    before = None
    if rank == 3:
        values = next(model[0].parameters()).data.view(-1)
        before = values[0].clone()
        values[0] = 1e38
    said = refused(refit)
    states = [(refit.version, refit.is_whole)]
    if before is not None:
        values[0] = before
    report = refit()
    states.append((refit.version, refit.is_whole))
    faults = [name for name, one in targets.items() if not is_equal(one, expected[name])]
    return {"said": said, "states": states, "is_delta": report.is_delta, "faults": faults}


def left_early(bridge: AutoBridge, model: list[Any], rank: int) -> str:
    """What the other rank of an export is told when one takes no more; and the next is whole."""

    def take() -> None:
        for number, _ in enumerate(bridge.export_hf_weights(model, window_bytes=WINDOW)):
            if rank == 3 and number == 5:
                break

    said = refused(take) if model else ""
    again = len(list(bridge.export_hf_weights(model))) if model else 0
    return f"{said}; then {again}"


def through_files(
    bridge: AutoBridge, model: list[Any], target: Path, fields: dict[str, Any], files: Files
) -> list[str]:
    """What differs after saves and loads by two of the ranks alone."""
    bridge.save_hf_pretrained(model, target)
    saved = read_tensors(target)
    bridge.save_megatron_model(model, f"{target}-megatron")
    again = bridge.load_megatron_model(f"{target}-megatron", mp_overrides=fields)
    loaded = dict(bridge.export_hf_weights(again))
    return [
        name
        for name, expected in files.items()
        if not is_equal(saved[name], expected) or not is_equal(loaded[name], expected)
    ]


def odd_exports(bridge: AutoBridge, model: list[Any], rank: int) -> list[str]:
    """What is said where one of two ranks asks for something else, or has something wrong."""
    if not model:
        return []
    is_odd = rank == 3
    settings: list[dict[str, Any]] = [
        {"window_bytes": WINDOW + is_odd},
        {"dtype": "float32" if is_odd else None},
    ]

    def said_to(**given: Any) -> str:
        return refused(lambda: list(bridge.export_hf_weights(model, **given)))

    said = [said_to(**one) for one in settings]
    tasks = bridge.get_conversion_tasks(model)
    if is_odd:
        tasks = [
            one if one.param_weight is None else replace(one, param_weight=one.param_weight[1:])
            for one in tasks
        ]
    return [*said, said_to(conversion_tasks=tasks)]


def called_once_more(folder: Path, rank: int) -> str:
    """What a rank is told that calls a refit which the others do not call."""
    name, first, fields = DISJOINT["stages"]
    bridge = AutoBridge.from_hf_pretrained(folder / name)
    group = dist.new_group()
    with on_two_ranks(bridge, first, fields) as model:
        refit = bridge.refit(model, {}, group=group)
        refit()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron.bridge.runtime.lost_ranks._ANSWER_SECONDS", 0.5)
            torch_own._set_pg_timeout(timedelta(seconds=2), group)
            said = refused(refit) if rank == 1 else ""
    dist.barrier()  # who goes home is gone
    return said


def into_an_engine(folder: Path, rank: int) -> dict[str, Any]:
    """Parameters of an engine on the last two ranks, filled as its own loader fills them."""
    bridge, files = AutoBridge.from_hf_pretrained(folder / "text"), read_tensors(folder / "text")
    with on_two_ranks(bridge, 0, layout(tp=2)) as model:
        if model:
            bridge.refit(model, {}, window_bytes=WINDOW)()
            return {}
        engine, loaded = (engine_of(bridge.hf_pretrained.config, rank - 2) for _ in range(2))
        loaded.load_weights(files.items())
        recording = record(engine.load_weights, engine.specs, engine.parameters)
        recording.fill_zeros(engine.parameters)
        targets = recording.landings(engine.parameters)
        bridge.refit([], targets, window_bytes=WINDOW)()
        return {
            "faults": [
                name
                for name, one in loaded.parameters.items()
                if not is_equal(one.data, engine.parameters[name].data)
            ],
            "zeros": len(recording.zeros),
            "unused": recording.unused,
            "tensors": {landing.name for landing in targets} == files.keys(),
        }


def worker(rank: int, folder: str) -> None:
    place = Path(folder)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {case: to_disjoint(place, rank, case) for case in DISJOINT}
    found["group"] = in_a_group(place, rank)
    found["engine"] = into_an_engine(place, rank)
    # The last: who waited in vain has told everybody.
    found["once more"] = called_once_more(place, rank)
    torch.save(found, place / f"found{rank}.pt")
    destroy_process_groups()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("between")
    make_models(folder, {"text", *(name for name, _, _ in DISJOINT.values())})
    run_ranks(worker, str(folder), world=WORLD, seconds=200)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", DISJOINT)
def test_ranks_without_a_part_of_the_model(case: str, found: list[dict[str, Any]]) -> None:
    first = DISJOINT[case][1]
    for rank, one in enumerate(found):
        here = one[case]
        assert here["faults"] == [[], [], [], []]
        assert here["version"] == 4
        whole, *later = here["reports"]
        assert [whole.version, *(report.version for report in later)] == [1, 2, 3, 4]
        assert whole.windows > 3
        assert not whole.is_delta
        assert all(report.is_delta for report in later)
        if first <= rank < first + 2:
            assert here["wanted"] == 0
            assert whole.sent_bytes > 0 == whole.received_bytes
            assert all(report.sent_bytes < whole.sent_bytes / 4 for report in later)
        else:
            assert here["wanted"] == here["files"] > 20
            assert whole.received_bytes > 0 == whole.sent_bytes
            assert "this rank is outside of the ranks that have the model" in here["outside"]


@pytest.mark.parametrize("case", DISJOINT)
def test_messages_between_pairs_of_ranks(case: str, found: list[dict[str, Any]]) -> None:
    assert [one[case]["collectives"] for one in found] == [([], [False, True])] * WORLD


def test_a_group_of_some_ranks(found: list[dict[str, Any]]) -> None:
    outside, *inside = (one["group"] for one in found)
    assert outside == {"odd": "this rank is not in the process group; call this where it is"}
    assert [one.get("files") for one in inside] == [[], [], None]
    for number, where in ((0, "first"), (1, "last")):
        for transport in ("all-to-all", "point-to-point"):
            of_ranks = [one[where, transport] for one in inside]
            assert [faults for faults, _, _ in of_ranks] == [[]] * 3
            sent, received = ([one[place] for one in of_ranks] for place in (1, 2))
            assert [bool(size) for size in sent] == [number == 0, number == 1, False]
            assert [bool(size) for size in received] == [False, False, True]
    for one in inside:
        assert f"rank 1 has window_bytes={WINDOW + 1}, rank 2 window_bytes={WINDOW};" in one["odd"]


@pytest.mark.parametrize("case", SAID)
def test_what_is_wrong_on_one_rank_is_refused_on_all(
    case: str, found: list[dict[str, Any]]
) -> None:
    for one in found:
        said = one["stages"]["refusals"][case]
        assert re.search(SAID[case], said), said
        assert not said.startswith("after")
        assert said.count("\n") < 6


def test_a_refit_that_stops_is_not_whole_until_the_next(found: list[dict[str, Any]]) -> None:
    for one in found:
        for here in one["stages"]["out of range"]:
            assert "float16" in here["said"].lower() or "F16" in here["said"]
            assert here["states"] == [(1, False), (3, True)]
            assert not here["is_delta"]
            assert here["faults"] == []


def test_an_export_that_one_rank_leaves_ends_on_the_others(found: list[dict[str, Any]]) -> None:
    one, other = (found[rank]["stages"]["left"] for rank in (2, 3))
    assert re.fullmatch(r"rank 3 cannot go on: it left before the end; .*; then \d+", one)
    assert re.fullmatch(r"nothing was refused; then \d\d+", other)


def test_an_export_with_something_wrong_on_one_rank(found: list[dict[str, Any]]) -> None:
    for one in found[2:]:
        window, dtype, tasks = one["stages"]["odd exports"]
        assert f"rank 2 has window_bytes={WINDOW}, rank 3 window_bytes={WINDOW + 1}" in window
        assert "the ranks have different plans: rank 2 has " in dtype
        assert "param_weight has shape" in tasks


def test_a_refit_that_one_rank_calls_alone_ends(found: list[dict[str, Any]]) -> None:
    assert "waited for ranks 0, 2, 3 until the time limit" in found[1]["once more"]


def test_an_engine_gets_what_its_own_loader_puts_there(found: list[dict[str, Any]]) -> None:
    of_engine = [one["engine"] for one in found[2:]]
    for here in of_engine:
        assert here["faults"] == []
        assert here["unused"] == ()
        assert here["tensors"]
    assert [here["zeros"] for here in of_engine] == [0, 2]
