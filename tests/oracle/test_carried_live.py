"""Live models and FP8 files of folders with names of their own and tensors beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from folders_in_memory import EMBEDDING, HEAD, Folder, read_tensors
from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.synthetic import make_model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same(left: Path, right: Path) -> bool:
    one, other = read_tensors(left), read_tensors(right)
    return one.keys() == other.keys() and all(
        torch.equal(bits(one[name]), bits(other[name])) for name in one
    )


def with_a_prefix_and_a_head(folder: Folder) -> None:
    folder.tensors["v_head.weight"] = torch.ones(1, 160)
    folder.rename(lambda name: f"module.{name}")


def with_a_copy_of_the_embedding(folder: Folder) -> None:
    folder.config["tie_word_embeddings"] = True
    folder.tensors[HEAD] = folder.tensors[EMBEDDING].clone()


@pytest.mark.parametrize("change", [with_a_prefix_and_a_head, with_a_copy_of_the_embedding])
def test_a_live_model_is_saved_as_the_folder_was(
    change: Callable[[Folder], None], tmp_path: Path, process_groups: None
) -> None:
    folder = Folder.of(make_model("qwen3-vl", tmp_path / "made", {"text.num_hidden_layers": 2}))
    change(folder)
    source = folder.write(tmp_path / "source")
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model()
    bridge.save_hf_pretrained(model, tmp_path / "saved")
    assert same(source, tmp_path / "saved")
    mapped = {weight.name for weight in bridge.export_hf_weights(model)}
    assert mapped == set(folder.tensors) - set(bridge.plan().carried)
    if change is with_a_copy_of_the_embedding:
        with torch.no_grad():
            model[0].language_model.embedding.word_embeddings.weight += 1
        bridge.save_hf_pretrained(model, tmp_path / "trained")
        trained = read_tensors(tmp_path / "trained")
        assert torch.equal(trained[HEAD], trained[EMBEDDING])
        assert not torch.equal(trained[HEAD], folder.tensors[HEAD])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_fp8_release_with_names_of_its_own(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"text.num_hidden_layers": 4, "fp8": True}
    folder = Folder.of(make_model("qwen3.5", tmp_path / "made", settings))
    folder.tensors["v_head.weight"] = torch.ones(1, 160)
    fc = folder.tensors["mtp.fc.weight"]
    folder.tensors["mtp.fc.weight"] = fc[:, : fc.shape[1] // 2].clone()
    folder.rename(lambda name: prefix + name)
    source = folder.write(tmp_path / "source")
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(source), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(source), "--fp8"]) == 0
    assert main(["verify", str(source), str(megatron)]) == 0
    capsys.readouterr()
    assert same(source, again)
