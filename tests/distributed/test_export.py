"""Exporting models that are split over ranks: every tensor bit for bit that of the files.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exchange_layouts import MODELS, QUICK, built, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.runtime.parallel import destroy_process_groups
from model_folders import read_tensors

WORLD = 4
WINDOW = 24_000
"""Bytes: less than the largest tensors have."""


def differences(given: dict[str, torch.Tensor], files: dict[str, torch.Tensor]) -> list[str]:
    """Of what is given, what is not the file's."""
    return [
        name
        for name, tensor in given.items()
        if tensor.dtype != files[name].dtype
        or tensor.shape != files[name].shape
        or not torch.equal(tensor.view(torch.uint8), files[name].view(torch.uint8))
    ]


def run_case(folder: Path, name: str) -> dict[str, Any]:
    model_name, _, fields = QUICK[name]
    bridge = AutoBridge.from_hf_pretrained(folder / model_name)
    model = built(bridge, MODELS[model_name][2] | fields)
    files = read_tensors(folder / model_name)
    found: dict[str, Any] = {}
    for to in ("all", "spread", 2):
        given = dict(bridge.export_hf_weights(model, to=to, window_bytes=WINDOW))
        found[str(to)] = list(given), differences(given, files)
    given = dict(bridge.export_hf_weights(model))
    found["one window"] = list(given), differences(given, files)
    return found


def worker(rank: int, folder: str) -> None:
    found = {name: run_case(Path(folder), name) for name in QUICK}
    torch.save(found, f"{folder}/found{rank}.pt")
    destroy_process_groups()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_models(folder, {model for model, _, _ in QUICK.values()})
    run_ranks(worker, str(folder), world=WORLD)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", QUICK)
def test_what_is_given_is_what_the_files_have(case: str, found: list[dict[str, Any]]) -> None:
    whole = found[0][case]["all"][0]
    assert len(whole) > 20
    for rank, one in enumerate(found):
        assert [wrong for _, wrong in one[case].values()] == [[]] * 4
        assert one[case]["all"][0] == one[case]["one window"][0] == whole
        assert one[case]["2"][0] == (whole if rank == 2 else [])
    spread = [one[case]["spread"][0] for one in found]
    assert sorted(name for names in spread for name in names) == sorted(whole)
    assert all(spread)
