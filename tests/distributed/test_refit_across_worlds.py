"""Refits between ranks of several worlds of torch.distributed: a trainer's, and an engine's.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from exchange_layouts import MODELS, built, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.formats.fp8_writer import block_scales, quantize
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.runtime.across_worlds import group_across_worlds
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.boxes import Box, full_box, slices
from megatron.bridge.tensors.torch_views import as_array, as_torch
from model_folders import read_tensors
from refit_targets import changed, wrong

WORLD, TRAINERS = 4, 2
WINDOW = 250_000
# Model, fields of the trainer's provider, keyword arguments of the refit.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "stages": ("vl", layout(pp=2, stages="Et|ttttL"), {"delta": True}),
    "tensor": ("hybrid", layout(tp=2), {"transport": "point-to-point"}),
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
    changed(model, 0.03, 11)
    reports.append(refit())
    found["wrong after"] = wrong(targets, job.exported(bridge, model))
    return found | {"version": refit.version, "reports": reports}


def in_fp8(job: Job) -> list[bool]:
    """Values and scales of a weight whose rows are the engine's, as of the whole weight."""
    name, block = "model.language_model.layers.0.mlp.down_proj.weight", BlockFP8(24, 40)
    bridge = AutoBridge.from_hf_pretrained(job.folder / "vl")
    model = job.model(bridge, "vl", layout(tp=2))
    whole = read_tensors(job.folder / "vl")[name]
    scales = block_scales(as_array(whole), block, np.dtype("float32"))
    values = torch.empty(whole.shape, dtype=torch.float8_e4m3fn)
    quantize(as_array(whole), scales, block, as_array(values))
    targets = []
    if not job.trains:
        [own] = landings({name: values}, job.rank - TRAINERS)
        targets = [own, Landing.whole(name + SCALE_SUFFIX, torch.zeros(scales.shape))]
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 40]}
    bridge.refit(model, targets, group=job.group, fp8=config)()
    expected = {name: values, name + SCALE_SUFFIX: as_torch(scales)}
    return [not wrong([one], expected) for one in targets]


def worker(rank: int, folder: str) -> None:
    job = Job(rank, Path(folder))
    found: dict[str, Any] = {name: run_case(job, name) for name in CASES}
    found["fp8"] = in_fp8(job)
    torch.save(found, f"{folder}/found{rank}.pt")
    if dist.is_initialized():
        destroy_process_groups()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("disjoint")
    make_models(folder, {model for model, _, _ in CASES.values()})
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


def test_scales_are_found_by_ranks_of_all_worlds(found: list[dict[str, Any]]) -> None:
    assert [one["fp8"] for one in found] == [[], [], [True, True], [True, True]]
