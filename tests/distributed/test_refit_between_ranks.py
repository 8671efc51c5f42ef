"""Refit between ranks of which some have no part of the model: bit for bit what the files hold.

Four processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exchange_layouts import MODELS, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.tensors.boxes import full_box, slices
from model_folders import read_tensors

WORLD = 4
WINDOW = 250_000
"""Bytes: less than the largest tensors have."""

type Files = Mapping[str, torch.Tensor]

# case: (model, first rank of the trainer, which has two, fields of the provider)
DISJOINT: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tensor": ("hybrid_mtp", 0, layout(tp=2)),
    "stages": ("vl", 2, layout(pp=2, stages="Et|ttttL")),
}


def is_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit."""
    one, other = (tensor.contiguous().view(torch.uint8) for tensor in (found, expected))
    return torch.equal(one, other)


def wrong(targets: list[Landing], files: Files) -> list[str]:
    return [one.name for one in targets if not is_equal(one.out, files[one.name][slices(one.box)])]


def uneven_targets(files: Files, names: list[str], place: int) -> list[Landing]:
    """What the first or the second of two ranks wants: two sevenths of the last axis, or more.

    The second also wants what lies at the middle, so that some of it goes to both.
    """
    found = []
    for number, name in enumerate(names):
        shape = tuple(files[name].shape)
        box = list(full_box(shape))
        if shape and shape[-1] > 6:
            size = shape[-1]
            box[-1] = (0, size * 2 // 7 + 1) if place == 0 else (size * 2 // 7 - 1, size)
        out = torch.zeros_like(files[name][slices(tuple(box))])
        if number % 2 and out.dim() > 1:
            out = torch.zeros_like(out.mT.contiguous()).mT
        found.append(Landing(name, tuple(box), out))
    return found


def changed(model: list[Any], part: float, seed: int) -> None:
    """Change some of the values of every parameter."""
    draw = torch.Generator().manual_seed(seed)
    for chunk in model:
        for parameter in chunk.parameters():
            values = parameter.data.view(-1)
            places = torch.randperm(len(values), generator=draw)[: round(len(values) * part)]
            values[places] = values[places] * 2 + 1


@contextmanager
def on_two_ranks(bridge: AutoBridge, first: int, fields: dict[str, Any]) -> Iterator[list[Any]]:
    """The chunks of this rank; none on the two ranks that are not the trainer's."""
    from megatron.core import parallel_state

    provider = bridge.to_megatron_provider()
    provider.set_fields(fields)
    provider.initialize_model_parallel(rank_offset=first, local_world_size=2)
    is_trainer = first <= dist.get_rank() < first + 2
    yield provider.provide_distributed_model(wrap_with_ddp=False) if is_trainer else []
    parallel_state.destroy_model_parallel()


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
        for step in range(2):
            changed(model, 0.03, 7 * step)
            reports.append(refit())
            # Export is among the trainer's ranks alone; the others are told by them.
            told = [dict(bridge.export_hf_weights(model)) if model else None]
            dist.broadcast_object_list(told, first)
            faults.append(wrong(targets, told[0]))
        return {
            "faults": faults,
            "wanted": len(targets),
            "reports": reports,
            "version": refit.version,
            "files": len(files),
        }


def worker(rank: int, folder: str) -> None:
    place = Path(folder)
    dist.init_process_group("gloo")
    found = {case: to_disjoint(place, rank, case) for case in DISJOINT}
    torch.save(found, place / f"found{rank}.pt")
    destroy_process_groups()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("between")
    make_models(folder, {name for name, _, _ in DISJOINT.values()})
    run_ranks(worker, str(folder), world=WORLD, seconds=200)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", DISJOINT)
def test_ranks_without_a_part_of_the_model(case: str, found: list[dict[str, Any]]) -> None:
    first = DISJOINT[case][1]
    for rank, one in enumerate(found):
        here = one[case]
        assert here["faults"] == [[], [], []]
        assert here["version"] == 3
        whole, *later = here["reports"]
        assert [whole.version, *(report.version for report in later)] == [1, 2, 3]
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
