"""Callers who made another device torch's default: bytes are moved on the host all the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.live.local_tensors import local_tensors
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.synthetic import make_model


@pytest.fixture(autouse=True)
def no_process_groups_left() -> Iterator[None]:
    yield
    destroy_process_groups()


@pytest.mark.parametrize("family", ["qwen3-vl", "qwen3.5-moe"])
def test_conversion_under_another_default_device(family: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        make_model(family, tmp_path / "hf", {}, seed=2)
        AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "megatron")
        bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
        bridge.export_ckpt(tmp_path / "megatron", tmp_path / "out")
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "megatron")]) == 0
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_loading_under_another_default_device(small_model: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(small_model)
    [expected] = bridge.to_megatron_model(wrap_with_ddp=False)
    [found] = bridge.to_megatron_model(load_weights=False, wrap_with_ddp=False)
    with torch.device("meta"):
        bridge.load_hf_weights([found])
        exported = dict(bridge.export_hf_weights([found]))
    for ours, theirs in zip(local_tensors([found]), local_tensors([expected]), strict=True):
        assert torch.equal(ours.data, theirs.data), ours.key
    assert {tensor.device.type for tensor in exported.values()} == {"cpu"}
