"""What one rank of an export or a save asks for differently from the others, or cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.bridge import AutoBridge
from refit_targets import refused

ODD = 1
"""The rank that is not like the others."""

SAID = {
    "to": ("to is 9", "to is 9"),
    "window_bytes": ("rank 0 has window_bytes=250000, rank 1 window_bytes=100000",) * 2,
    "round": ("rank 0 has round=False, rank 1 round=True",) * 2,
    "another dtype": ("the ranks have different plans: rank 0 has TensorSpec",) * 2,
    "no dtype": ("dtype is 'float3'", "rank 1 cannot go on: dtype is 'float3'"),
    "tasks": ("conversion_tasks=None, rank 1 conversion_tasks='some'",) * 2,
    "more parameters": ("more.weight: no Hugging Face tensor fills it",) * 2,
    "no chunks": ("model is an empty list", "rank 1 cannot go on: model is an empty list"),
    "save of another dtype": ("the ranks have different plans",) * 2,
    "save that rounds": ("rank 0 has round=False, rank 1 round=True",) * 2,
    "save like nothing": ("there is no such folder", "rank 1 cannot go on"),
}
"""What the odd rank says and what the others say."""


def refusals(bridge: AutoBridge, model: list[Any], folder: Path, rank: int) -> dict[str, str]:
    """What this rank says to each."""
    is_odd, target = rank == ODD, folder / "refused"

    def export(chunks: list[Any] = model, **odd: Any) -> Callable[[], object]:
        given = {"window_bytes": 250_000} | (odd if is_odd else {})
        return lambda: list(bridge.export_hf_weights(chunks if is_odd else model, **given))

    def save(**odd: Any) -> Callable[[], object]:
        return lambda: bridge.save_hf_weights(model, target, **(odd if is_odd else {}))

    tasks = bridge.get_conversion_tasks(model)
    said = {
        "to": refused(export(to=9)),
        "window_bytes": refused(export(window_bytes=100_000)),
        "round": refused(export(round=True)),
        "another dtype": refused(export(dtype="float32")),
        "no dtype": refused(export(dtype="float3")),
        "tasks": refused(export(conversion_tasks=tasks)),
        "no chunks": refused(export([])),
        "save of another dtype": refused(save(dtype="float32")),
        "save that rounds": refused(save(round=True)),
        "save like nothing": refused(save(source_path=folder / "nowhere")),
        "left": "something" if target.exists() else "",
    }
    if is_odd:
        model[0].more = torch.nn.Linear(3, 5)
    said["more parameters"] = refused(export())
    if is_odd:
        del model[0].more
    return said


def under_other_defaults(
    bridge: AutoBridge, model: list[Any], wrong: Callable[[dict[str, torch.Tensor]], list[str]]
) -> list[str]:
    """What is wrong of an export and a refit with a default device that has no memory."""
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        given = dict(bridge.export_hf_weights(model, window_bytes=250_000))
        found = wrong(given)
        for tensor in given.values():
            tensor.zero_()
        refit = bridge.refit(model, given, window_bytes=250_000, delta=True)
        for _ in range(2):
            refit()
            found += wrong(given)
    return found
