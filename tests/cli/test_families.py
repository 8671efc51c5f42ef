"""The commands with every family: what they say of experts, MTP layers, dtypes and FP8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli_documentation import DOCUMENTATION
from megatron.bridge.cli import main
from megatron.bridge.cli.output import WIDTH
from megatron.bridge.synthetic import make_model
from vision_families import FAMILIES

KEYS = {"qwen3-vl": 115, "qwen3.5-moe": 206}
BRIDGES = {"qwen3-vl": "Qwen3VLBridge", "qwen3.5-moe": "Qwen35VLMoEBridge"}
EXPERTS = {
    "qwen3-vl": {"decoder": None, "mtp": None},
    "qwen3.5-moe": {"decoder": "fused", "mtp": "per-expert"},
}
HYBRID = ("qwen3.5-moe",)


def shown(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The table of a command that ends well, its lines joined."""
    assert main([str(arg) for arg in args]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    return " ".join(out.split())


def document(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Any:
    assert main([*map(str, args), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


@pytest.fixture(params=["qwen3-vl", "qwen3.5-moe"])
def family(request: pytest.FixtureRequest) -> str:
    """The least that there is to say, and the most."""
    return str(request.param)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3.5-moe", tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="module")
def moe_checkpoint(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "moe"
    assert main(["import", str(moe), str(folder)]) == 0
    return folder


def test_there_and_back(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, megatron, back = tmp_path / "model", tmp_path / "megatron", tmp_path / "back"
    made = document(capsys, "make-model", "--family", family, "--out", model)
    assert made["hf"]["keys"] == KEYS[family]
    seen = document(capsys, "inspect", model)
    assert (seen["bridge"], seen["proven"]) == (BRIDGES[family], True)
    assert seen["experts"] == EXPERTS[family]
    assert seen["mtp"] == {"in_config": family in HYBRID, "present": family in HYBRID}
    assert (seen["dtypes_assumed"], seen["quantization"], seen["carried"]) == (False, None, {})
    imported = document(capsys, "import", model, megatron)
    assert imported["hf"] == made["hf"]
    assert (imported["inexact"], imported["quantization"]) == ([], None)
    exported = document(capsys, "export", megatron, back, "--hf", model)
    assert exported["keys"] == KEYS[family]
    assert document(capsys, "verify", model, back)["side_files"] == []
    across = document(capsys, "verify", megatron, back)
    assert (across["identical"], across["equal"]) == (True, KEYS[family])
    text = shown(capsys, "inspect", model)
    assert ("MTP layer present" in text) == (family in HYBRID)
    for part, layout in EXPERTS[family].items():
        named = {"decoder": "decoder", "mtp": "MTP layer"}[part]
        assert layout is None or f"{layout} ({named})" in text


def test_a_config_alone(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(family, tmp_path / "model")
    whole = document(capsys, "inspect", model)
    (tmp_path / "config").mkdir()
    shutil.copy(model / "config.json", tmp_path / "config")
    alone = document(capsys, "inspect", tmp_path / "config")
    for same in ("hf", "megatron", "rows", "experts"):
        assert alone[same] == whole[same]
    assert alone["dtypes_assumed"] is True
    assert alone["mtp"] == {"in_config": family in HYBRID, "present": None}
    text = shown(capsys, "inspect", tmp_path / "config")
    assert "dtypes assumed no file says them: BF16, as the config says" in text
    assert ("F32 for model.language_model.layers." in text) == (family in HYBRID)
    assert ("named by the config, no files at hand" in text) == (family in HYBRID)


def test_an_mtp_layer_that_only_the_config_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a model that transformers saved."""
    folder = make_model("qwen3.5", tmp_path / "model", {"text.mtp_num_hidden_layers": 0})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    assert document(capsys, "inspect", folder)["mtp"] == {"in_config": True, "present": False}
    assert "named by the config, not in the files" in shown(capsys, "inspect", folder)


def test_fp8(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(family, tmp_path / "model", {"fp8": True})
    expected = {"method": "fp8", "rows": 128, "columns": 128}
    seen = document(capsys, "inspect", model)
    assert seen["quantization"] == expected
    assert seen["hf"]["dtypes"].keys() >= {"F8_E4M3", "BF16"}
    assert seen["hf"]["bytes"] < seen["megatron"]["bytes"]
    assert "fp8, one scale for each block of 128x128" in shown(capsys, "inspect", model)
    megatron = tmp_path / "megatron"
    imported = shown(capsys, "import", model, megatron)
    assert "fp8, blocks of 128x128: dequantized to BF16" in imported
    again = document(capsys, "export", megatron, tmp_path / "fp8", "--hf", model, "--fp8")
    assert again["quantization"] == expected
    assert {key: again[key] for key in ("keys", "bytes")} == {
        key: seen["hf"][key] for key in ("keys", "bytes")
    }
    assert document(capsys, "verify", model, tmp_path / "fp8")["equal"] == again["keys"]
    plain = document(capsys, "export", megatron, tmp_path / "bf16", "--hf", model)
    assert plain["quantization"] is None
    assert (plain["keys"], plain["bytes"]) == (KEYS_OF_FP8[family], plain["hf"]["bytes"])
    assert document(capsys, "verify", model, tmp_path / "bf16")["identical"] is True


# Of Qwen3.5-MoE, FP8 files hold all experts one by one.
KEYS_OF_FP8 = KEYS | {"qwen3.5-moe": 206 + 7 * (3 * 6 - 2)}


@pytest.mark.parametrize("layout", ["fused", "fused-transposed", "per-expert"])
def test_other_layouts_of_experts(
    layout: str, moe_checkpoint: Path, moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    document(capsys, "export", moe_checkpoint, out, "--hf", moe, "--experts", layout)
    assert document(capsys, "inspect", out)["experts"] == {"decoder": layout, "mtp": layout}
    assert document(capsys, "verify", moe_checkpoint, out)["identical"] is True


def test_experts_options_that_mean_nothing(
    moe: Path,
    moe_checkpoint: Path,
    small_model: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    each = make_model(
        "qwen3-vl-moe", tmp_path_factory.mktemp("each") / "model", {"experts": "per-expert"}
    )
    for args, said in (
        (["import", moe, tmp_path / "out", "--experts", "packed"], "fused, fused-transposed, per"),
        (["import", moe, tmp_path / "out", "--experts", "fused-transposed"], "lies fused, not"),
        (["import", small_model, tmp_path / "out", "--experts", "fused"], "no routed experts"),
        (["import", each, tmp_path / "out", "--experts", "fused"], "lie per-expert, not fused"),
        (
            ["export", moe_checkpoint, tmp_path / "out", "--hf", moe, "--experts", "x"],
            "fused, fused-transposed, per-expert",
        ),
    ):
        assert main([*map(str, args)]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "intermediate"),
    [("fused", 80), ("fused-transposed", 160)],
    ids=["gate_up is square", "down is square"],
)
def test_of_square_experts_the_other_matrix_decides(
    answer: str, intermediate: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command finds how they lie; a word to the contrary is refused."""
    settings = {"text.moe_intermediate_size": intermediate, "experts": answer}
    model = make_model("qwen3-vl-moe", tmp_path / "model", settings)
    found = {"decoder": answer, "mtp": None}
    assert document(capsys, "inspect", model)["experts"] == found
    assert document(capsys, "plan", model)["experts"] == found
    other = "fused" if answer == "fused-transposed" else "fused-transposed"
    assert main(["import", str(model), str(tmp_path / "megatron"), "--experts", other]) == 2
    message = capsys.readouterr().err
    assert f"lies {answer}, not {other}" in message
    assert ("down_proj of shape" if intermediate == 80 else "gate_up_proj of shape") in message
    document(capsys, "import", model, tmp_path / "megatron")
    document(capsys, "export", tmp_path / "megatron", tmp_path / "out", "--hf", model)
    assert document(capsys, "verify", model, tmp_path / "out")["identical"] is True
    assert document(capsys, "verify", tmp_path / "megatron", model)["identical"] is True


def test_what_will_not_come_back_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = make_model("qwen3.5", tmp_path / "model")
    name = "model.language_model.layers.1.linear_attn.norm.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][5] = 1e-9
    tensors[name.replace(".1.", ".2.")][3] = 1.75
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = document(capsys, "import", model, tmp_path / "a")
    assert [entry["name"] for entry in done["inexact"]] == [name]
    assert done["inexact"][0]["max_abs_diff"] == pytest.approx(1e-9, rel=1e-6)
    text = shown(capsys, "import", model, tmp_path / "b")
    assert "Not exact on the way back tensor largest error" in text
    assert f"{name} 1.00e-09" in text
    document(capsys, "export", tmp_path / "a", tmp_path / "back", "--hf", model)
    assert main(["verify", str(model), str(tmp_path / "back"), "--json"]) == 1
    (different,) = json.loads(capsys.readouterr().out)["different"]
    assert (different["name"], different["elements"]) == (name, 1)
    assert torch.tensor(different["max_abs_diff"]) == pytest.approx(1e-9, rel=1e-6)


def test_carried_tensors_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from megatron.bridge.cli.render.tables import carried_table

    reason = "the Megatron model is built without its MTP layer"
    names = [f"mtp.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(6)]
    console = Console(width=WIDTH)
    with console.capture() as captured:
        console.print(carried_table(dict.fromkeys([*names, "mtp.fc.weight"], reason)))
    assert "mtp.layers.0.mlp.experts.{0...5}.up_proj.weight" in captured.get()
    assert captured.get().count(reason) == 2


def test_families_and_layouts_are_described() -> None:
    text = DOCUMENTATION.read_text("utf-8")
    for word in (*FAMILIES, "--experts", "--fp8", "fused-transposed", "per-expert", "quantized"):
        assert word in text
