"""Quantized files that cannot be used: refused by name, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.cli import main
from megatron.bridge.synthetic import make_model
from refusals import NOWHERE

WEIGHT = "model.language_model.layers.3.self_attn.o_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
IN_ALL_LAYERS = WEIGHT.replace("3", "{0...4}")
type Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never changed: `damaged` makes copies."""
    return make_model("qwen3-vl", tmp_path_factory.mktemp("fp8") / "model", {"fp8": True})


@pytest.fixture(scope="module")
def checkpoint(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "megatron"
    assert main(["import", str(release), str(folder)]) == 0
    return folder


def damaged(
    release: Path,
    folder: Path,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[Tensors], object] | None = None,
) -> Path:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in release.iterdir():
        (folder / file.name).symlink_to(file)
    if config is not None:
        data = json.loads((release / "config.json").read_text())
        config(data)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(data))
    if tensors is not None:
        held = load_file(release / "model.safetensors")
        tensors(held)
        (folder / "model.safetensors").unlink()
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The message of a command that ends with 2."""
    assert main([str(arg) for arg in args]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def section(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(changes)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "gptq": (section(quant_method="gptq"), ("'gptq'", "'fp8'")),
    "awq": (section(quant_method="awq"), ("'awq'",)),
    "no method": (lambda c: c["quantization_config"].pop("quant_method"), ("quant_method",)),
    "no blocks": (section(weight_block_size=None), ("weight_block_size is missing",)),
    "one size": (section(weight_block_size=[128]), ("weight_block_size", "[128]")),
    "no size": (section(weight_block_size=[0, 128]), ("weight_block_size", "[0, 128]")),
    "other blocks": (
        section(weight_block_size=[64, 128]),
        ("{0...4}", "_proj.weight_scale_inv", "(6, 2)", "(3, 2)"),
    ),
    "other format": (section(fmt="e5m2"), ("fmt", "'e5m2'")),
    "static": (section(activation_scheme="static"), ("activation_scheme", "'static'")),
    "no object": (lambda c: c.update(quantization_config="fp8"), ("quantization_config",)),
    "inside": (
        lambda c: c["text_config"].update(quantization_config=c.pop("quantization_config")),
        ("text_config",),
    ),
    "not said": (
        lambda c: c.pop("quantization_config"),
        ("{0...4}", "but config.json has no quantization_config"),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(
    case: str, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = CONFIGS[case]
    folder = damaged(release, tmp_path / "model", config=change)
    for message in (
        refused(capsys, "import", folder, tmp_path / "out"),
        refused(capsys, "inspect", folder),
    ):
        for part in named:
            assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def move(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def change(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: to(tensors[name])})


FILES: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "no scale": (lambda t: t.pop(SCALE), (f"{WEIGHT}: F8_E4M3, but its scale {SCALE} is missing",)),
    "no weight": (lambda t: t.pop(WEIGHT), (f"{SCALE}: its weight {WEIGHT} is missing",)),
    "scale renamed": (move(SCALE, f"{WEIGHT}_scale"), (f"scale {SCALE} is missing",)),
    "scale of another shape": (
        change(SCALE, lambda scale: scale[:1].clone()),
        (SCALE, "(2, 2)", "found (1, 2)"),
    ),
    "scale transposed": (
        change(
            "model.language_model.layers.0.mlp.down_proj.weight_scale_inv",
            lambda scale: scale.T.contiguous(),
        ),
        ("down_proj.weight_scale_inv", "(2, 3)", "found (3, 2)"),
    ),
    "scale in float16": (change(SCALE, torch.Tensor.half), (SCALE, "F16", "F32 or BF16")),
    "weight in bfloat16": (change(WEIGHT, torch.Tensor.bfloat16), (SCALE, "its weight is BF16")),
    "weight in e5m2": (change(WEIGHT, lambda w: w.to(torch.float8_e5m2)), (WEIGHT, "F8_E5M2")),
    "a norm quantized": (
        lambda t: t.update(
            {
                "model.language_model.norm.weight": t["model.language_model.norm.weight"].to(
                    torch.float8_e4m3fn
                ),
                "model.language_model.norm.weight_scale_inv": torch.ones(2),
            }
        ),
        ("model.language_model.norm.weight_scale_inv", "blocks need two axes"),
    ),
    "gptq": (
        lambda t: t.update(
            {WEIGHT.replace("weight", "qweight"): torch.zeros(4, dtype=torch.int32)}
        ),
        ("o_proj.qweight", "not supported"),
    ),
    "static scales": (
        lambda t: t.update({WEIGHT.replace("weight", "activation_scale"): torch.ones(1)}),
        ("o_proj.activation_scale", "not supported"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(
    case: str,
    release: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, named = FILES[case]
    folder = damaged(release, tmp_path / "model", tensors=change)
    for message in (
        refused(capsys, "import", folder, tmp_path / "out"),
        refused(capsys, "inspect", folder),
        refused(capsys, "verify", folder, checkpoint),
        refused(capsys, "export", checkpoint, tmp_path / "out", "--hf", folder, "--fp8"),
    ):
        for part in named:
            assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [0.0, -0.5, torch.inf, torch.nan])
def test_scales(
    value: float,
    release: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[SCALE][1, 1] = value

    folder = damaged(release, tmp_path / "model", tensors=spoil)
    for args in (
        ["import", folder, NOWHERE],
        ["export", checkpoint, NOWHERE, "--hf", folder, "--fp8"],
    ):
        message = refused(capsys, *args)
        assert f"{SCALE} holds 1 scales that are not positive numbers" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_that_is_not_finite(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is imported as it is, and cannot be quantized again."""

    def spoil(tensors: Tensors) -> None:
        tensors[WEIGHT].view(torch.uint8)[3, 4] = 0x7F  # the NaN of e4m3

    folder = damaged(release, tmp_path / "model", tensors=spoil)
    assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0
    capsys.readouterr()
    message = refused(
        capsys, "export", tmp_path / "megatron", tmp_path / "out", "--hf", folder, "--fp8"
    )
    assert f"{WEIGHT}: cannot be quantized" in message
    assert not (tmp_path / "out").exists()


def test_references_that_do_not_say_how(
    release: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = make_model("qwen3-vl", tmp_path / "plain")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((release / "config.json").read_bytes())
    out = ["export", checkpoint, tmp_path / "out", "--fp8", "--hf"]
    assert "is not quantized, so it does not say how" in refused(capsys, *out, plain)
    assert "holds no weights" in refused(capsys, *out, tmp_path / "config")
    for option, value in (("experts", "fused"), ("dtype", "float32")):
        message = refused(capsys, *out, release, f"--{option}", value)
        assert f"fp8 and {option} exclude each other" in message
    assert not (tmp_path / "out").exists()


def test_blocks_that_are_longer_than_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block of 128 rows is quantized at once: 128 x 2048 bytes, with room to compute thrice."""
    settings = {"fp8": True, "text.intermediate_size": 2048, "text.num_hidden_layers": 3}
    make_model("qwen3-vl", tmp_path / "model", settings)
    assert main(["import", str(tmp_path / "model"), str(tmp_path / "megatron")]) == 0
    out = ["export", tmp_path / "megatron", tmp_path / "out", "--hf", tmp_path / "model", "--fp8"]
    said = refused(capsys, *out, "--memory", "4500kB")
    assert "memory (--memory): 4500000 bytes are too small; give " in said
    assert not (tmp_path / "out").exists()
    least = said.split("give ")[1].split()[0]
    assert main([*map(str, out), "--memory", least]) == 0
