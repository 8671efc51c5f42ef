"""Dtypes: files of several, checkpoints of another than the release, live models of either."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.errors import InexactCast, InputError
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.synthetic import make_model
from model_folders import change_tensors, read_tensors, same_tensors
from refusals import refused

OUT_PROJ = "model.language_model.layers.2.self_attn.o_proj.weight"


def layer_in_f32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    # Values that BF16 does not hold, so that nothing narrower would do.
    return tensor.float() + 2**-20 if name == OUT_PROJ else tensor


def queries_in_f32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() + 2**-20 if "q_proj" in name else tensor


def layers_in_turns(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Layers in F16 among those in BF16; F32 holds both."""
    return tensor.half() if ".layers.1." in name or ".blocks.0." in name else tensor


def norms_in_bf16(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if name.endswith("linear_attn.norm.weight") else tensor


def first_a_log_in_bf16(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if name.endswith("layers.0.linear_attn.A_log") else tensor


def one_nan(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("layers.0.self_attn.o_proj.weight"):
        tensor.view(torch.int16)[3, 5] = -0x7F  # a NaN with a payload, negative
    return layer_in_f32(name, tensor)


CHANGES = [
    pytest.param("qwen3-vl", layer_in_f32, marks=pytest.mark.slow),
    ("qwen3-vl", queries_in_f32),
    pytest.param("qwen3-vl", layers_in_turns, marks=pytest.mark.slow),
    ("qwen3-vl", one_nan),
    ("qwen3-vl-moe", layers_in_turns),
    ("qwen3.5", norms_in_bf16),
    pytest.param("qwen3.5", first_a_log_in_bf16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_files_of_several_dtypes_come_back(
    family: str, change: Callable[[str, torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = make_model(family, tmp_path / "hf", {}, seed=21)
    change_tensors(folder, change)
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    assert main(["import", str(folder), str(megatron), "--verify"]) == 0
    assert main(["export", str(megatron), str(out), "--hf", str(folder), "--verify"]) == 0
    assert same_tensors(folder, out)


def test_a_difference_below_the_dtype_of_a_file_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a key that is wide because of another layer."""
    folder = make_model("qwen3-vl", tmp_path / "hf", {}, seed=22)
    change_tensors(folder, layer_in_f32)
    other = make_model("qwen3-vl", tmp_path / "other", {}, seed=22)
    nudged = OUT_PROJ.replace("2", "1")
    change_tensors(other, lambda n, t: t.float() + 2**-21 if n == nudged else layer_in_f32(n, t))
    assert main(["import", str(other), str(tmp_path / "megatron")]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder), str(tmp_path / "megatron"), "--json"]) == 1
    different = json.loads(capsys.readouterr().out)["different"]
    assert [(one["name"], one["what"]) for one in different] == [(nudged, "bits")]
    message = refused(capsys, "export", tmp_path / "megatron", tmp_path / "out", "--hf", folder)
    assert f"{nudged} from " in message


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 release, and a checkpoint of a model that was trained from it in F32."""
    folder = tmp_path_factory.mktemp("trained")
    make_model("qwen3.5", folder / "hf", {"num_shards": 2}, seed=23)
    make_model("qwen3.5", folder / "f32", {"num_shards": 2}, seed=23)
    change_tensors(folder / "f32", lambda name, tensor: tensor.float() * (1 + 2**-13))
    AutoBridge.import_ckpt(folder / "f32", folder / "megatron")
    return folder


def paths_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_in_another_dtype_is_exported_exactly_or_not_at_all(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(
        capsys, "export", trained / "megatron", tmp_path / "out", "--hf", trained / "hf"
    )
    assert "do not fit bfloat16 exactly (off by up to " in message
    assert '--dtype float32 (dtype="float32") keeps them, --round (round=True) rounds' in message
    assert len(message.splitlines()) <= 6
    assert paths_of(tmp_path) == []
    bridge = AutoBridge.from_hf_pretrained(trained / "hf")
    with pytest.raises(InexactCast):
        bridge.export_ckpt(trained / "megatron", tmp_path / "out")
    assert paths_of(tmp_path) == []


def test_an_export_in_the_dtype_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    bridge = AutoBridge.from_hf_pretrained(trained / "hf")
    bridge.export_ckpt(trained / "megatron", tmp_path / "out", dtype=torch.float32)
    assert same_tensors(trained / "f32", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated_dtypes(config) == {"float32"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def stated_dtypes(config: dict[str, Any]) -> set[str]:
    sections = [config, *(one for one in config.values() if isinstance(one, dict))]
    return {
        section[key] for section in sections for key in ("dtype", "torch_dtype") if key in section
    }


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"], ["--dtype", "float16"]])
def test_a_rounded_export(options: list[str], trained: Path, tmp_path: Path) -> None:
    words = [
        "export",
        str(trained / "megatron"),
        str(tmp_path / "out"),
        "--hf",
        str(trained / "hf"),
    ]
    assert main([*words, "--round", *options]) == 0
    dtype = torch.float16 if "float16" in options else torch.bfloat16
    release = read_tensors(trained / "hf")
    wide, found = read_tensors(trained / "f32"), read_tensors(tmp_path / "out")
    assert list(found) == list(release)
    for name, tensor in found.items():
        kept = release[name].dtype == torch.float32
        assert tensor.dtype == (torch.float32 if kept else dtype), name
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated_dtypes(config) == {"float16" if "float16" in options else "bfloat16"}


def test_options_that_contradict(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", trained / "megatron", tmp_path / "out", "--hf", trained / "hf"]
    assert "fp8 and dtype exclude" in refused(capsys, *words, "--fp8", "--dtype", "float32")


def test_a_config_alone_gives_the_dtypes_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    shutil.copy(trained / "hf" / "config.json", tmp_path / "config")
    bridge = AutoBridge.from_hf_pretrained(tmp_path / "config")
    bridge.export_ckpt(trained / "megatron", tmp_path / "out")
    assert same_tensors(trained / "f32", tmp_path / "out")


@pytest.fixture(scope="module")
def wide_model(trained: Path, process_groups: None) -> Any:
    """The trained model, live and in F32, and the bridge of the BF16 release."""
    bridge = AutoBridge.from_hf_pretrained(trained / "hf")
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype, provider.bf16 = torch.float32, False
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights(chunks, trained / "f32")
    return bridge, chunks


def test_a_live_model_in_another_dtype(wide_model: Any, trained: Path, tmp_path: Path) -> None:
    bridge, chunks = wide_model
    ways_out = r"round=True rounds them, dtype=torch\.float32 keeps them$"
    for save in (bridge.save_hf_pretrained, bridge.save_hf_weights):
        with pytest.raises(InexactCast, match=ways_out):
            save(chunks, tmp_path / "out")
    with pytest.raises(InexactCast, match=ways_out):
        dict(bridge.export_hf_weights(chunks))
    assert paths_of(tmp_path) == []
    bridge.save_hf_pretrained(chunks, tmp_path / "wide", dtype="float32")
    kept = read_tensors(trained / "f32")
    found = read_tensors(tmp_path / "wide")
    carried = [name for name in kept if name.startswith("mtp.")]
    assert {name: tensor.dtype for name, tensor in found.items() if name not in carried} == {
        name: torch.float32 for name in kept if name not in carried
    }
    assert all(torch.equal(found[name], kept[name]) for name in kept if name not in carried)
    bridge.save_hf_pretrained(chunks, tmp_path / "rounded", round=True)
    release = read_tensors(trained / "hf")
    for name, tensor in read_tensors(tmp_path / "rounded").items():
        assert tensor.dtype == release[name].dtype
    rounded = dict(bridge.export_hf_weights(chunks, dtype=torch.float16, round=True))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float16, torch.float32}


def test_what_was_saved_in_f32_is_loaded_in_f32(wide_model: Any, tmp_path: Path) -> None:
    bridge, chunks = wide_model
    bridge.save_megatron_model(chunks, tmp_path / "saved")
    inner = TorchDistCheckpoint(tmp_path / "saved").folder
    record = yaml.safe_load((inner / "run_config.yaml").read_text())
    assert (record["model"]["params_dtype"], record["model"]["bf16"]) == ("float32", False)
    assert stated_dtypes(record["hf"]["config"]) == {"float32"}
    [loaded] = bridge.load_megatron_model(tmp_path / "saved")
    here, there = dict(chunks[0].named_parameters()), dict(loaded.named_parameters())
    assert all(torch.equal(there[name], weight) for name, weight in here.items())
    with pytest.raises(InexactCast, match=r"round=True rounds them, dtype=torch\.float32 keeps"):
        bridge.load_megatron_model(tmp_path / "saved", dtype=torch.bfloat16)
    [narrow] = bridge.load_megatron_model(tmp_path / "saved", dtype="bfloat16", round=True)
    dtypes = {weight.dtype for weight in narrow.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}  # A_log and the norm hold what was stored
    assert narrow.config.bf16


def test_fields_of_the_provider_are_set_before_it_builds(wide_model: Any, trained: Path) -> None:
    bridge, _ = wide_model
    overrides = {"make_vocab_size_divisible_by": 96, "freeze_vision_model": True}
    [model] = bridge.load_megatron_model(trained / "megatron", mp_overrides=overrides)
    assert model.config.padded_vocab_size % 96 == 0
    assert not model.vision_model.patch_embed.proj.weight.requires_grad
    message = r"mp_overrides: tensor_parallel_size: .* no field of this name; was tensor_\w+ meant"
    with pytest.raises(InputError, match=message):
        bridge.load_megatron_model(trained / "megatron", mp_overrides={"tensor_parallel_size": 1})


def test_a_norm_that_the_model_does_not_hold(wide_model: Any, trained: Path) -> None:
    bridge, _ = wide_model
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.ssm_dtype = torch.bfloat16
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    with pytest.raises(InexactCast, match="load with round=True to round them") as error:
        bridge.load_hf_weights(chunks, trained / "f32")
    assert "dtype=" not in str(error.value)
    bridge.load_hf_weights(chunks, trained / "f32", round=True)


def test_an_fp8_export_of_a_wide_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounded to BF16 first, if that is asked for."""
    release = make_model("qwen3.5", tmp_path / "fp8", {"fp8": True}, seed=23)
    words: list[str | Path] = ["export", trained / "megatron", tmp_path / "out", "--hf", release]
    message = refused(capsys, *words, "--fp8")
    assert "--round (round=True) rounds them before they are quantized" in message
    assert "--dtype" not in message
    assert paths_of(tmp_path) == ["fp8"]
    assert main([*map(str, words), "--fp8", "--round"]) == 0
    found = {name: tensor.dtype for name, tensor in read_tensors(tmp_path / "out").items()}
    assert found == {name: tensor.dtype for name, tensor in read_tensors(release).items()}
