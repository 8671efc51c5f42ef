"""Quantizations that are not read, and entries of quantization where nothing is quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.cli import main
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.synthetic import make_model
from refusals import NOWHERE, refused

type Tensors = dict[str, torch.Tensor]

UP = ".mlp.up_proj"
"""Of each layer, the matrix that the cases quantize."""


def changed(
    model: Path, folder: Path, tensors: Callable[[Tensors], object], config: dict[str, Any]
) -> Path:
    """A copy of a model in one file."""
    shutil.copytree(model, folder)
    stored: Tensors = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def replaced(**parts: torch.dtype) -> Callable[[Tensors], object]:
    """Each matrix replaced by tensors named behind its module; "_" stands for "."."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(f"{UP}.weight")]:
            del tensors[name]
            for part, dtype in parts.items():
                new = name.removesuffix("weight") + part.replace("__", ".", 1)
                tensors[new] = torch.ones(6, 4).to(dtype)

    return change


def in_fp8(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith(f"{UP}.weight"):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def and_scale(suffix: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        in_fp8(tensors)
        for name in [name for name in tensors if name.endswith(f"{UP}.weight")]:
            tensors[name + suffix] = torch.ones(1)

    return change


def left_scales(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(f"{UP}.weight")]:
        tensors[f"{name}_scale_inv"] = torch.ones(3, 2)


def nothing(_: Tensors) -> None: ...


U8, I8, I32, F16, BF16, F32 = (
    torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32,
)  # fmt: skip
BY_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}

METHODS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "bitsandbytes, 4 bits": (
        replaced(
            weight=U8, weight__absmax=U8, weight__quant_map=F32, weight__nested_absmax=F32,
            **{"weight__quant_state.bitsandbytes__nf4": U8},
        ),
        "bitsandbytes in 4 bits",
    ),
    "bitsandbytes, 8 bits": (
        replaced(weight=I8, SCB=F32, weight_format=U8), "bitsandbytes in 8 bits"
    ),
    "GPTQ": (replaced(qweight=I32, qzeros=I32, g_idx=I32, scales=F16), "GPTQ or AWQ"),
    "AWQ": (replaced(qweight=I32, qzeros=I32, scales=F16), "GPTQ or AWQ"),
    "compressed-tensors": (
        replaced(weight_packed=I32, weight_scale=BF16, weight_shape=I32), "compressed-tensors"
    ),
    "NVFP4": (replaced(weight=U8, weight_scale=BF16, weight_scale_2=F32), "NVFP4"),
    "MLX": (replaced(weight=I32, scales=F16, biases=F16), "MLX"),
    "HQQ": (replaced(W_q=U8, zero=F16, scale=F16), "HQQ"),
    "FP8 by tensor": (and_scale("_scale"), "a scale for each tensor or each row"),
}  # fmt: skip


def refused_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of `import`, which `inspect` and `plan` have, too, behind what they show."""
    message = refused(capsys, "import", folder, NOWHERE)
    for command in ("inspect", "plan"):
        assert main([command, str(folder)]) == 2
        printed = capsys.readouterr()
        assert "not proven" in printed.out
        # What is at fault is named by the file or by the folder that it lies in.
        assert (
            printed.err.partition(": ")[2].partition(": ")[2]
            == message.partition(": ")[2].partition(": ")[2]
        )
    assert message.count("\n") <= 6
    assert "download" not in message
    return message


@pytest.mark.parametrize("case", METHODS)
def test_methods_that_config_does_not_name(
    case: str, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = METHODS[case]
    folder = changed(small_model, tmp_path / "model", change, {})
    message = refused_alike(folder, capsys)
    assert named in message
    assert UP in message
    assert "Use the release in BF16, or in FP8 by block" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("config", [{}, {"quantization_config": BY_BLOCK}], ids=["", "config"])
def test_fp8_without_scales(
    config: dict[str, Any],
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = changed(small_model, tmp_path / "model", in_fp8, config)
    message = refused_alike(folder, capsys)
    assert "FP8 weights without scales have no known values; use the whole FP8 release" in message
    assert f"layers.{{0...4}}{UP}.weight: F8_E4M3, but its scale" in message


def test_scales_of_weights_that_are_not_quantized(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(small_model, tmp_path / "model", left_scales, {})
    assert f"{UP}.weight_scale_inv: its weight is BF16" in refused_alike(folder, capsys)


@pytest.mark.parametrize(
    "section",
    [
        BY_BLOCK,
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"load_in_8bit": True},
    ],
    ids=lambda section: section.get("quant_method", "no method"),
)
@pytest.mark.parametrize("where", ["", "text_config."])
def test_an_entry_that_was_left_behind(
    where: str,
    section: dict[str, Any],
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The advice is right: without it the model is converted."""
    config = json.loads((small_model / "config.json").read_text())
    key = f"{where}quantization_config"
    holder = config["text_config"] if where else config
    holder["quantization_config"] = section
    folder = changed(small_model, tmp_path / "model", nothing, config)
    message = refused_alike(folder, capsys)
    assert f"{key} was left behind: the weights are not quantized, all are BF16" in message
    assert f"Remove {key} from it" in message
    del holder["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0
    capsys.readouterr()


def test_an_entry_without_anything(small_model: Path, tmp_path: Path) -> None:
    """transformers takes it for none; it comes back as it was."""
    folder = changed(small_model, tmp_path / "model", nothing, {"quantization_config": {}})
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(folder), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(folder)]) == 0
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_a_config_alone_says_how_the_release_is_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there are no weights, nothing was left behind."""
    release = make_model("qwen3-vl", tmp_path / "release", {"fp8": True})
    assert "F8_E4M3" in {info.dtype for info in TensorIndex.from_folder(release).values()}
    assert main(["plan", str(release / "config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == {
        "method": "fp8", "rows": 128, "columns": 128,
    }  # fmt: skip


@pytest.mark.parametrize("part", ["input_scale", "scales", "g_idx", "weight_shape", "gate_blocks"])
def test_names_of_a_method_where_nothing_is_quantized(
    part: str, small_model: Path, tmp_path: Path
) -> None:
    """What calibration left, or chance named so: transformers loads it, and it comes back."""

    def beside(tensors: Tensors) -> None:
        tensors[f"model.language_model.layers.0{UP}.{part}"] = torch.tensor([3.0, 5.0])

    folder = changed(small_model, tmp_path / "model", beside, {})
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(folder), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(folder)]) == 0
    file = "model.safetensors"
    assert (again / file).read_bytes() == (folder / file).read_bytes()
