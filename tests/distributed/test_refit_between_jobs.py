"""Refit between the ranks of two jobs, a trainer's and an engine's, which are joined by a group."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exchange_layouts import built, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.runtime.across_worlds import group_across_worlds
from megatron.bridge.runtime.parallel import destroy_process_groups
from model_folders import read_tensors
from refit_targets import changed, is_equal, refused, wrong
from two_of_four_ranks import WINDOW, uneven_targets

pytestmark = pytest.mark.slow


def worker(rank: int, folder: str) -> None:
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    own = dist.PrefixStore("trainer" if rank < 2 else "engine", store)
    dist.init_process_group("gloo", store=own, rank=rank % 2, world_size=2)
    group = group_across_worlds(store, rank, 4, timeout=timedelta(seconds=60))
    place = Path(folder) / "vl"
    bridge, files = AutoBridge.from_hf_pretrained(place), read_tensors(place)
    model = built(bridge, layout(tp=2)) if rank < 2 else []
    found: dict[str, Any] = {}
    for transport in ("all-to-all", "point-to-point"):
        targets = [] if model else uneven_targets(files, sorted(files), rank - 2)
        options: dict[str, Any] = {"group": group, "window_bytes": WINDOW, "transport": transport}
        refit = bridge.refit(model, targets, delta=True, **options)
        refit()
        found[transport] = wrong(targets, files), len(targets)
    changed(model, 0.03, 5)
    report = refit()
    found["changes"] = report.is_delta, report.version
    odd = {"targets": {"no such tensor": torch.zeros(2)}} if rank == 3 else {"targets": {}}
    found["refused"] = refused(lambda: bridge.refit(model, **odd, group=group))
    if model:  # the trainer's own job
        exported = dict(bridge.export_hf_weights(model))
        told: list[Any] = [exported]
    else:
        told = [None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    found["changed"] = [
        one.name
        for one in targets
        if not is_equal(one.out, told[0][one.name][tuple(slice(*axis) for axis in one.box)])
    ]
    torch.save(found, f"{folder}/found{rank}.pt")
    destroy_process_groups()


def test_two_jobs(tmp_path: Path) -> None:
    make_models(tmp_path, {"vl"})
    run_ranks(worker, str(tmp_path), world=4, seconds=200)
    for rank in range(4):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=False)
        for transport in ("all-to-all", "point-to-point"):
            faults, wanted = found[transport]
            assert faults == []
            assert (wanted > 20) == (rank > 1)
        assert found["changes"] == (True, 2)
        assert found["changed"] == []
        assert "rank 3 wants no such tensor" in found["refused"]
