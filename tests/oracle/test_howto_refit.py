"""docs/howto/refit.md runs as it stands, and transformers' own model of what arrived in FP8."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.synthetic import make_model
from model_folders import read_tensors

PAGE = (Path(__file__).parents[2] / "docs/howto/refit.md").read_text("utf-8")
BF16, FP8 = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct-FP8"
TOKENS = torch.arange(3, 40)[None]


def logits(folder: Path) -> torch.Tensor:
    model = PreTrainedVLM.from_pretrained(folder).load_model(dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def test_the_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_groups: None
) -> None:
    blocks = re.findall(r"<!-- executed by \S+ -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    into_fp8, rounded, merged = blocks
    monkeypatch.chdir(tmp_path)
    trainer = make_model("qwen3-vl", tmp_path / BF16, seed=9)
    release = make_model("qwen3-vl", tmp_path / FP8, {"fp8": True}, seed=4)
    of_release, of_trainer = read_tensors(release), read_tensors(trainer)

    engine = {name: torch.zeros_like(tensor) for name, tensor in of_release.items()}
    names: dict[str, Any] = {
        "AutoBridge": AutoBridge,
        "torch": torch,
        "engine": SimpleNamespace(state_dict=lambda: engine),
        "targets": {name: torch.zeros_like(tensor) for name, tensor in of_trainer.items()},
    }
    exec(compile(into_fp8, "refit.md", "exec"), names)  # the page is ours
    assert sum(name.endswith(SCALE_SUFFIX) for name in engine) > 10
    [file] = release.glob("*.safetensors")
    before = (logits(release) - logits(trainer)).abs().max()
    save_file(engine, file, metadata={"format": "pt"})
    expected = logits(trainer)
    difference = (logits(release) - expected).abs().max()
    assert 0 < difference < 0.2 * expected.abs().max() < before
    of_the_same = read_tensors(make_model("qwen3-vl", tmp_path / "same", {"fp8": True}, seed=9))
    assert [
        name
        for name, tensor in engine.items()
        if not torch.equal(tensor.view(torch.uint8), of_the_same[name].view(torch.uint8))
    ] == []

    exec(compile(rounded, "refit.md", "exec"), names)
    assert all(torch.equal(names["targets"][name], of_trainer[name]) for name in of_trainer)

    exec(compile(merged, "refit.md", "exec"), names)
    differs = [
        name for name in of_trainer if not torch.equal(names["targets"][name], of_trainer[name])
    ]
    assert len(differs) == sum(
        name.endswith(
            ("_proj.weight", "qkv.weight", "attn.proj.weight", "_fc1.weight", "_fc2.weight")
        )
        for name in of_trainer
    )
