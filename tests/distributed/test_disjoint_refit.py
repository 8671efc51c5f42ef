"""Refits between ranks of several worlds: a trainer's, which have no target, and an engine's.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exchange.engine_loaders import Engine, text_model
from exchange_layouts import MODELS, built, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.exchange.recording import record
from megatron.bridge.live.refit import Refit
from megatron.bridge.live.weights import plan_of_ranks
from megatron.bridge.runtime.across_worlds import group_across_worlds
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.boxes import Box, full_box, slices
from model_folders import read_tensors

WORLD, TRAINERS = 4, 2
WINDOW = 250_000
# Model, fields of the trainer's provider, keyword arguments of the refit.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tensor": ("hybrid", layout(tp=2), {}),
    "stages": ("vl", layout(pp=2, stages="Et|ttttL"), {"delta": True}),
    "experts": ("vl_moe", layout(ep=2), {"transport": "point-to-point"}),
}
REFUSED = {
    "shape": "its memory is of shape (3, 4)",
    "dtype": "its memory is F16, which does not hold all values of BF16",
    "name": "the model has no such tensor",
    "box": "its shape is",
    "meta": "on the meta device",
    "strides": "several elements of its memory are in one place",
    "window": "window_bytes",
    "delta": "delta",
    "transport": "transport",
    "plan": "the ranks have different plans: rank 0 has",
}


def part(name: str, shape: tuple[int, ...], rank: int) -> Box | None:
    """Of the engine's ranks the first takes three sevenths of the rows, and small tensors whole."""
    if len(shape) < 2:
        return full_box(shape)
    cut = shape[0] * 3 // 7
    start, stop = ((0, cut), (cut, shape[0]))[rank]
    return ((start, stop), *full_box(shape[1:])) if start < stop else None


def landings(files: dict[str, torch.Tensor], rank: int) -> list[Landing]:
    found = []
    for name, tensor in files.items():
        if (box := part(name, tuple(tensor.shape), rank)) is not None:
            found.append(Landing(name, box, torch.zeros_like(tensor[slices(box)])))
    return found


def wrong(found: list[Landing], tensors: dict[str, torch.Tensor]) -> list[str]:
    expected = ((one, tensors[one.name][slices(one.box)].contiguous()) for one in found)
    return [
        one.name
        for one, values in expected
        if not torch.equal(one.out.view(torch.uint8), values.view(torch.uint8))
    ]


class Job:
    """This rank: of a trainer's world, of an engine's, or of no world at all."""

    def __init__(self, rank: int, folder: Path) -> None:
        port = int(os.environ["MASTER_PORT"])
        self.rank, self.folder = rank, folder
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        self.trains = rank < TRAINERS
        if self.trains:
            own = dist.PrefixStore("trainer", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=TRAINERS)
        # The last rank stays without a world of its own, the other engine has one.
        elif rank == TRAINERS:
            own = dist.PrefixStore("engine", store)
            dist.init_process_group("gloo", store=own, rank=0, world_size=1)
        self.group = group_across_worlds(store, rank, WORLD, timeout=timedelta(minutes=3))

    def engine(self, files: dict[str, torch.Tensor]) -> list[Landing]:
        return [] if self.trains else landings(files, self.rank - TRAINERS)

    def model(self, bridge: AutoBridge, name: str, fields: dict[str, Any]) -> list[Any]:
        return built(bridge, MODELS[name][2] | fields) if self.trains else []

    def exported(self, bridge: AutoBridge, model: list[Any]) -> dict[str, torch.Tensor]:
        """What the trainer exports now, on every rank."""
        own = dict(bridge.export_hf_weights(model)) if self.trains else {}
        found: dict[str, torch.Tensor] = Ranks(self.group).all_of(lambda: own)[0]
        return found


def run_case(job: Job, name: str) -> dict[str, Any]:
    model_name, fields, options = CASES[name]
    bridge = AutoBridge.from_hf_pretrained(job.folder / model_name)
    model = job.model(bridge, model_name, fields)
    files = read_tensors(job.folder / model_name)
    given = job.exported(bridge, model)
    targets = job.engine({name: files[name] for name in given})
    refit = bridge.refit(model, targets, group=job.group, window_bytes=WINDOW, **options)
    reports = [refit()]
    found: dict[str, Any] = {"wrong": wrong(targets, files), "wanted": len(targets)}
    draw = torch.Generator().manual_seed(11)
    for chunk in model:
        for parameter in chunk.parameters():
            some = torch.rand(parameter.shape, generator=draw) < 0.03
            parameter.data[some] += 1
    reports.append(refit())
    found["wrong after"] = wrong(targets, job.exported(bridge, model))
    return found | {"version": refit.version, "reports": reports}


def recorded(job: Job) -> dict[str, Any]:
    """A refit to where an engine's own loader, of two ranks, was seen to put things."""
    folder = job.folder / "text"
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = job.model(bridge, "text", layout(pp=2, stages="Ettt|ttL"))
    if job.trains:
        bridge.refit(model, [], group=job.group, window_bytes=WINDOW)()
        return {}
    config = json.loads((folder / "config.json").read_text())
    filled, loaded = (Engine(2, job.rank - TRAINERS) for _ in range(2))
    for engine in (filled, loaded):
        text_model(engine, config)
    loaded.load_weights(read_tensors(folder).items())
    recording = record(filled.load_weights, filled.specs, filled.parameters)
    for place in recording.zeros:
        place.of(filled.parameters).zero_()
    targets = recording.landings(filled.parameters)
    bridge.refit([], targets, group=job.group, window_bytes=WINDOW)()
    return {
        name: torch.equal(parameter, loaded.parameters[name])
        for name, parameter in filled.parameters.items()
    }


def refusals(job: Job) -> dict[str, str]:
    """What each rank is told where the last one asks for something that cannot be."""
    bridge = AutoBridge.from_hf_pretrained(job.folder / "hybrid")
    model = job.model(bridge, "hybrid", layout(tp=2))
    last = job.rank == WORLD - 1
    norm = "model.language_model.norm.weight"
    size = read_tensors(job.folder / "hybrid")[norm].shape[0]
    fine = Landing.whole(norm, torch.zeros(size, dtype=torch.bfloat16))
    odd: dict[str, Callable[[], Landing]] = {
        "shape": lambda: Landing(norm, full_box((size,)), torch.zeros(3, 4)),
        "dtype": lambda: Landing.whole(norm, torch.zeros(size, dtype=torch.float16)),
        "name": lambda: Landing.whole("norm.weight", fine.out),
        "box": lambda: Landing(norm, ((1, size + 1),), fine.out),
        "meta": lambda: Landing.whole(norm, fine.out.to("meta")),
        "strides": lambda: Landing.whole(norm, fine.out[:1].expand(size)),
    }
    options: dict[str, dict[str, Any]] = {
        "window": {"window_bytes": 125_000},
        "delta": {"delta": True},
        "transport": {"transport": "point-to-point"},
        "plan": {},
    }
    plan = plan_of_ranks(bridge.hf_pretrained, model, Ranks(job.group))
    wide = plan_of_ranks(bridge.hf_pretrained, model, Ranks(job.group), dtype="float32")
    found = {}
    for name in REFUSED:
        targets = [] if job.trains else [odd[name]() if last and name in odd else fine]
        asked = {"window_bytes": WINDOW} | (options.get(name, {}) if last else {})
        try:
            Refit(
                model,
                targets,
                wide if last and name == "plan" else plan,
                group=job.group,
                **asked,
            )
        except BridgeError as error:
            found[name] = str(error)
    refit = bridge.refit(model, [] if job.trains else [fine], group=job.group)
    refit()
    assert refit.version == 1
    return found


def worker(rank: int, folder: str) -> None:
    job = Job(rank, Path(folder))
    found: dict[str, Any] = {name: run_case(job, name) for name in CASES}
    found["refusals"] = refusals(job)
    found["recorded"] = recorded(job)
    torch.save(found, f"{folder}/found{rank}.pt")
    if dist.is_initialized():
        destroy_process_groups()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("disjoint")
    make_models(folder, {"text", *(model for model, _, _ in CASES.values())})
    run_ranks(worker, str(folder), world=WORLD, seconds=200)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_every_box_arrives(case: str, found: list[dict[str, Any]]) -> None:
    ranks = [one[case] for one in found]
    assert [one["wanted"] > 20 for one in ranks] == [False, False, True, True]
    for one in ranks:
        assert one["wrong"] == one["wrong after"] == []
        assert one["version"] == 2
    for number, report in ((number, one["reports"][1]) for number, one in enumerate(ranks)):
        assert report.is_delta == bool(CASES[case][2].get("delta"))
        assert (report.sent_bytes > 0) == (number < TRAINERS)
        assert (report.received_bytes > 0) == (number >= TRAINERS)
        assert report.own_bytes == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_refuses_all_refuse(name: str, found: list[dict[str, Any]]) -> None:
    told = [one["refusals"].get(name) for one in found]
    assert all(REFUSED[name] in (one or "") for one in told), told
    assert all(len(str(one).splitlines()) <= 6 for one in told)


def test_an_engine_is_filled_as_its_own_loader_fills_it(found: list[dict[str, Any]]) -> None:
    for one in found[TRAINERS:]:
        assert len(one["recorded"]) > 30
        assert all(one["recorded"].values()), one["recorded"]
