"""What lies beside a model, and a reference that is of another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron.bridge.cli import main
from megatron.bridge.errors import ConfigError
from megatron.bridge.synthetic import make_model
from refusals import refused


def test_settings_of_a_trainer_come_back(
    small_model: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """They are named like weights; weights in another format stay where they are."""
    model = shutil.copytree(small_model, tmp_path / "model")
    (model / "training_args.bin").write_bytes(b"\x80\x04N.")
    (model / "pytorch_model.bin").write_bytes(b"old")
    assert main(["export", str(small_checkpoint), str(tmp_path / "out"), "--hf", str(model)]) == 0
    assert (tmp_path / "out" / "training_args.bin").read_bytes() == b"\x80\x04N."
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_reference_of_another_family(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model("qwen3.5", tmp_path / "other", {"text.num_hidden_layers": 3})
    said = refused(capsys, "export", small_checkpoint, tmp_path / "out", "--hf", other)
    assert "is of a 'qwen3_vl' model by its run_config.yaml" in said
    assert "of a 'qwen3_5'" in said
    assert len(said.splitlines()) == 1


def test_a_model_in_float64(small_model: Path, tmp_path: Path) -> None:
    """Files convert; megatron-core computes in no such dtype, which is said when one is built."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron.bridge import AutoBridge

    model = shutil.copytree(small_model, tmp_path / "model")
    for path in model.glob("*.safetensors"):
        wide = {name: tensor.double() for name, tensor in load_file(path).items()}
        save_file(wide, path, {"format": "pt"})
    assert main(["import", str(model), str(tmp_path / "megatron")]) == 0
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "megatron"), str(out), "--hf", str(model)]) == 0
    assert main(["verify", str(model), str(out)]) == 0
    provider = AutoBridge.from_hf_pretrained(model).to_megatron_provider(load_weights=False)
    assert provider.params_dtype == torch.float64
    with pytest.raises(ConfigError, match=r"params_dtype is torch\.float64"):
        provider.finalize()


def test_a_processor_saved_by_another_version(
    small_model: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """One processor_config.json for all, a folder below; an older chat_template.json."""
    import json

    from PIL import Image
    from sklearn.datasets import load_sample_images
    from transformers import AutoProcessor

    picture = tmp_path / "china.png"
    Image.fromarray(load_sample_images().images[0]).resize((128, 96)).save(picture)
    model = shutil.copytree(small_model, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(model)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"):
        (model / name).unlink()
    processor.save_pretrained(model)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    template = (model / "chat_template.jinja").read_text()
    assert main(["compare", str(model), "--image", str(picture)]) == 0
    out = tmp_path / "out"
    assert main(["export", str(small_checkpoint), str(out), "--hf", str(model)]) == 0
    assert names_below(out) == names_below(model)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert main(["compare", str(model), "--image", str(picture)]) == 0


def names_below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
