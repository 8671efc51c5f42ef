"""A rank that is killed in the middle: the others stop, say which, and leave no target."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exchange_layouts import built, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.transport import AllToAll, PointToPoint

WORLD = 4
LOST = 2
CALLS = ("export", "refit", "messages", "changes", "save")


def die(*_: object, **__: object) -> None:
    os._exit(0)


def calls(bridge: AutoBridge, model: Any, target: Path) -> dict[str, Callable[[], object]]:
    tensors = {name: torch.empty_like(one) for name, one in bridge.export_hf_weights(model)}
    refits = {
        "refit": bridge.refit(model, tensors, window_bytes=250_000),
        "messages": bridge.refit(model, tensors, window_bytes=250_000, transport="point-to-point"),
        "changes": bridge.refit(model, tensors, window_bytes=250_000, delta=True),
    }
    refits["changes"]()  # all
    return {
        "export": lambda: list(bridge.export_hf_weights(model, window_bytes=250_000)),
        **refits,
        "save": lambda: bridge.save_hf_pretrained(model, target),
    }


def worker(rank: int, folder: str, name: str) -> None:
    bridge = AutoBridge.from_hf_pretrained(f"{folder}/hybrid")
    model = built(bridge, layout(tp=2, pp=2))
    call = calls(bridge, model, Path(folder) / f"{name}-saved")[name]
    with pytest.MonkeyPatch.context() as patch:
        if rank == LOST:
            for transport in (AllToAll, PointToPoint):
                patch.setattr(transport, "start", _third(transport.start, die))
            patch.setattr("megatron.bridge.live.shared_files.write_all", die)
        begin = time.monotonic()
        try:
            call()
        except InputError as error:
            found = str(error)
        else:
            found = "nothing was refused"
    Path(f"{folder}/{name}{rank}").write_text(f"{time.monotonic() - begin:.0f} s: {found}")
    os._exit(0)  # its connections are broken


def _third(start: Callable[..., Any], last: Callable[..., None]) -> Callable[..., Any]:
    """A method that runs twice, and then ends."""
    seen: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        seen.append(1)
        return last() if len(seen) > 2 else start(*args, **options)

    return counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    make_models(folder, {"hybrid"})
    return folder


@pytest.mark.parametrize(
    "name",
    [name if name == "refit" else pytest.param(name, marks=pytest.mark.slow) for name in CALLS],
)
def test_the_others_name_it(folder: Path, name: str) -> None:
    run_ranks(worker, str(folder), name, world=WORLD, seconds=200)
    for rank in range(WORLD):
        told = folder / f"{name}{rank}"
        assert told.exists() == (rank != LOST)
        if rank != LOST:
            assert f"rank {LOST} is gone" in told.read_text(), told.read_text()
    assert not (folder / f"{name}-saved").exists()
