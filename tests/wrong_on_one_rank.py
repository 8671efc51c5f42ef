"""Targets and settings of a refit that are wrong on one rank, and what has to be said on all."""

from __future__ import annotations

from typing import Any

import torch

from megatron.bridge import AutoBridge
from megatron.bridge.exchange.landing import Landing
from refit_targets import Files, refused
from two_of_four_ranks import WINDOW

ODD = 2
"""The rank that is not like the others; it has a part of the model."""


SAID = {
    "shape": r"norm\.weight: its memory is of shape \(\d+,\); expected \(",
    "shape of memory": r"norm\.weight\[0:\d+\]: its memory is of shape",
    "dtype": "its memory is F16, which does not hold all values of BF16",
    "name": r"wants model\.norm\[0:\d+\]: the model has no such tensor",
    "box": r"wants lm_head\.weight\[0:3, 1:\d+\]: its shape is",
    "form of a box": "expected a tuple with a pair",
    "no tensor": "its memory is None; expected a tensor",
    "overlapping": r"lm_head.*\[0:\d+, 0:9\]: its memory overlaps that of lm_head.*8:17",
    "of the model": "overlaps that of the model's ",
    "expanded": "several elements of its memory are in one place",
    "meta": "on the meta device",
    "plan": "the ranks have different plans: rank 0 has ",
    "no dtype": "no dtype",
    "window": f"rank 0 has window_bytes={WINDOW}, rank 2 window_bytes={WINDOW + 1}",
    "no window": "window_bytes is 0",
    "node": "rank 0 has ranks_per_node=None, rank 2 ranks_per_node=2",
    "no node": "ranks_per_node is 0",
    "delta": "rank 0 has delta=False, rank 2 delta=True",
    "round": "rank 0 has round=False, rank 2 round=True",
    "transport": "rank 0 has transport='point-to-point', rank 2 transport='all-to-all'",
    "no transport": "transport is 'pigeon'; expected 'all-to-all' or 'point-to-point'",
    "nothing": "nothing was refused",
}
"""By case, what is part of the message on every rank."""


def refusals(bridge: AutoBridge, model: list[Any], files: Files, rank: int) -> dict[str, str]:
    """What each rank says to targets and settings of which those of one rank are wrong."""
    names = ["lm_head.weight", "model.language_model.norm.weight"]
    good = {name: torch.zeros_like(files[name]) for name in names}
    head, norm = (good[name] for name in names)
    rows, hidden = head.shape
    own = next((one.data for chunk in model for one in chunk.parameters()), head)
    of_model = Landing(names[1], ((0, hidden),), own.view(-1)[3 : 3 + hidden])
    columns = [
        Landing(names[0], ((0, rows), (start, start + 9)), head[:, start : start + 9])
        for start in (0, 8)
    ]
    beyond = Landing(names[0], ((0, 3), (1, hidden + 1)), torch.zeros_like(head[:3]))
    of_row = Landing(names[0], ((0, rows), (0, hidden)), norm.expand(rows, hidden))
    odd_targets: dict[str, Any] = {
        "shape": good | {names[1]: norm[1:]},
        "shape of memory": [Landing(names[1], ((0, hidden),), norm[1:])],
        "dtype": good | {names[1]: norm.half()},
        "name": good | {"model.norm": norm.clone()},
        "box": [beyond],
        "form of a box": [Landing(names[1], [[0, hidden]], norm)],  # type: ignore[list-item,arg-type]
        "no tensor": good | {names[1]: None},
        "overlapping": columns,
        "of the model": [of_model],
        "expanded": [of_row],
        "meta": good | {names[1]: norm.to("meta")},
    }
    odd_settings: dict[str, dict[str, Any]] = {
        "plan": {"dtype": "float32"},
        "no dtype": {"dtype": "no dtype"},
        "window": {"window_bytes": WINDOW + 1},
        "no window": {"window_bytes": 0},
        "node": {"ranks_per_node": 2},
        "no node": {"ranks_per_node": 0},
        "delta": {"delta": True},
        "round": {"round": True},
        "transport": {"transport": "all-to-all"},
        "no transport": {"transport": "pigeon"},
    }

    def say(targets: Any, settings: dict[str, Any]) -> str:
        is_odd = rank == ODD
        given = {"window_bytes": WINDOW} | (settings if is_odd else {})
        return refused(lambda: bridge.refit(model, targets if is_odd else good, **given))

    said = {name: say(targets, {}) for name, targets in odd_targets.items()}
    said |= {name: say(good, settings) for name, settings in odd_settings.items()}
    return said | {"nothing": say(good, {})}
