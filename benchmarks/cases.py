"""The models that are measured, and what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from released_configs import QWEN3_VL_2B, QWEN3_VL_4B, QWEN3_VL_30B_A3B

START, SPEED, MEMORY = "start", "speed", "memory"


@dataclass(frozen=True, slots=True)
class Case:
    """One model.

    family: of `megatron.bridge.synthetic`. settings: on top of its small config; a whole
    config.json replaces it. role: SPEED, every step in every round, with copies; START, the same
    beside `import torch`; MEMORY, every step once and for its memory. base: of a MEMORY case the
    case that has half its size. goal: of import and export, the whole process, the most that it
    may take, as a multiple of what stands beside it.
    """

    name: str
    title: str
    family: str
    settings: Mapping[str, Any]
    role: str
    base: str | None = None
    goal: float | None = None


def _cut(config: Mapping[str, Any], layers: int, depth: int, taps: list[int]) -> dict[str, Any]:
    """The same widths with fewer layers in the decoder and in the vision tower."""
    text = {**config["text_config"], "num_hidden_layers": layers}
    vision = {**config["vision_config"], "depth": depth, "deepstack_visual_indexes": taps}
    return {**config, "text_config": text, "vision_config": vision}


def _moe(layers: int) -> dict[str, Any]:
    return _cut(QWEN3_VL_30B_A3B, layers, depth=3, taps=[0, 2])


def _with_experts(config: Mapping[str, Any], experts: int) -> dict[str, Any]:
    return {**config, "text_config": {**config["text_config"], "num_experts": experts}}


CASES = (
    Case("small", "Small model", "qwen3-vl", {}, START, goal=0.33),
    Case("dense", "Qwen3-VL-2B", "qwen3-vl", QWEN3_VL_2B, SPEED, goal=1.15),
    Case("moe", "Qwen3-VL-30B-A3B, 2 layers", "qwen3-vl-moe", _moe(2), SPEED, goal=1.15),
    Case("dense-large", "Qwen3-VL-4B", "qwen3-vl", QWEN3_VL_4B, MEMORY, "dense"),
    Case("moe-large", "Qwen3-VL-30B-A3B, 6 layers", "qwen3-vl-moe", _moe(6), MEMORY, "moe"),
)
"""Small ones first: a fault shows before gigabytes are made."""


_EXPERTS = 32

EXCHANGE_MODEL = Case(
    "exchange",
    f"Qwen3-VL-30B-A3B, 2 layers of {_EXPERTS} experts",
    "qwen3-vl-moe",
    _with_experts(_moe(2), _EXPERTS),
    SPEED,
)
"""What is moved between ranks."""

LIVE_MODEL = replace(CASES[1], name="live")
"""What a live model is filled with."""

SHARED_MODEL = replace(CASES[1], name="shared-blocks")
"""What is imported where files can share blocks."""

OTHERS = (EXCHANGE_MODEL, LIVE_MODEL, SHARED_MODEL)
"""What is measured in ways of its own."""


def reduced(case: Case, layers: int | None, *, tiny: bool) -> Case:
    """The case with `layers` decoder layers, with `tiny` at the widths of tests; for trying out.

    A START case stays as it is; a MEMORY case has twice the layers.
    """
    if case.role == START or (layers is None and not tiny):
        return case
    settings: dict[str, Any] = {} if tiny else dict(case.settings)
    title = f"{case.title}, tiny" if tiny else case.title
    if layers is not None:
        layers *= 2 if case.role == MEMORY else 1
        cut: Mapping[str, Any] = {
            "text_config": {"num_hidden_layers": layers},
            "vision_config": {"deepstack_visual_indexes": [0, 2][:layers]},
        }
        settings |= {key: {**settings.get(key, {}), **value} for key, value in cut.items()}
        title = f"{title}, {layers} layer{'s' * (layers > 1)}"
    return replace(case, title=title, settings=settings)
