"""Checkpoints of several iterations, and what a checkpoint tells of its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.auto_bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.formats.config_record import CONFIG_RECORD
from megatron.bridge.formats.iterations import TRACKER_FILE, folder_name
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import Box
from providers import one_process
from refusals import NOWHERE, refused
from tensors_in_memory import put
from torch_dist_folders import write_torch_dist

OTHER_RECORD = """\
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider
  activation_func:
    _target_: torch.nn.functional.silu
    _call_: false
  params_dtype: &id001 !!python/object/apply:torch.BFloat16 []
  autocast_dtype: *id001
  transformer:
    hf_model_id: Qwen/Qwen3-VL-2B-Instruct
checkpoint:
  ckpt_format: torch_dist
"""


def run_json(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Any:
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """What a command prints, without the line ends that the width of a table makes."""
    assert main([*map(str, args)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def second_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    folder = tmp_path_factory.mktemp("second") / "model"
    shutil.copytree(small_model, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = {name: -tensor for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def trained(
    small_checkpoint: Path, second_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Iterations 90 and release of one model, 1200 of the other; 90 is tracked."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    AutoBridge.import_ckpt(second_model, folder)
    (folder / folder_name(0)).rename(folder / folder_name(1200))
    for iteration in (90, "release"):
        shutil.copytree(small_checkpoint / folder_name(0), folder / folder_name(iteration))
    (folder / TRACKER_FILE).write_text("90\n")
    return folder


def test_inspect_lists_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", trained)
    assert found["iterations"] == ["90", "1200", "release"]
    assert (found["tracked_iteration"], found["iteration"]) == ("90", "90")
    assert "iterations 90 (tracked), 1200, release" in printed(capsys, "inspect", trained)
    chosen = run_json(capsys, "inspect", trained, "--iteration", "1200")
    assert (chosen["iteration"], chosen["tracked_iteration"]) == ("1200", "90")
    assert chosen["folder"] == str(trained / "iter_0001200")
    one = run_json(capsys, "inspect", trained / "iter_0001200")
    assert (one["iterations"], one["tracked_iteration"]) == ([], None)


@pytest.mark.parametrize(
    ("iteration", "second"), [(None, False), ("1200", True), ("001200", True), ("release", False)]
)
def test_each_is_read(
    iteration: str | None,
    second: bool,
    trained: Path,
    small_model: Path,
    second_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = second_model if second else small_model
    other = small_model if second else second_model
    chosen = () if iteration is None else ("--iteration", iteration)
    out = tmp_path / "out"
    assert main(["export", str(trained), str(out), "--hf", str(small_model), *chosen]) == 0
    assert main(["verify", str(out), str(model)]) == 0
    assert main(["verify", str(trained), str(model), *chosen]) == 0
    assert main(["verify", str(other), str(trained), *chosen]) == 1
    capsys.readouterr()
    assert run_json(capsys, "plan", trained, *chosen)["proven"]


def test_in_python(trained: Path, second_model: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(second_model)
    bridge.export_ckpt(trained, tmp_path / "out", iteration=1200)
    assert main(["verify", str(tmp_path / "out"), str(second_model)]) == 0
    with pytest.raises(CheckpointError, match=r"no iteration 7 in .*; there are 90, 1200, release"):
        bridge.export_ckpt(trained, tmp_path / "again", iteration=7)


def test_a_model_is_loaded_from_each(trained: Path, second_model: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(second_model)
    index = TensorIndex.from_folder(second_model)
    with one_process():
        (model,) = bridge.load_megatron_model(trained, iteration=1200)
        for name, tensor in bridge.export_hf_weights([model]):
            assert torch.equal(tensor, index.read(name)), name


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("91", "names iter_0000091, which holds no .metadata; there are 90, 1200, release"),
        (None, "no latest_checkpointed_iteration.txt says which iteration to read; there are 90"),
    ],
)
def test_the_tracker_names_none_of_them(
    tracker: str | None,
    said: str,
    trained: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained, folder)
    (folder / TRACKER_FILE).unlink()
    if tracker is not None:
        (folder / TRACKER_FILE).write_text(tracker)
    for args in (
        ("inspect", folder),
        ("plan", folder),
        ("export", folder, NOWHERE, "--hf", small_model),
        ("verify", folder, small_model),
    ):
        message = refused(capsys, *args)
        assert said in message
        assert "--iteration N" in message
    shown = run_json(capsys, "inspect", folder, "--iteration", "90")
    assert (shown["iteration"], shown["tracked_iteration"]) == ("90", tracker)


def test_where_no_iteration_can_be_chosen(
    trained: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (
        ("inspect", small_model),
        ("plan", small_model),
        ("verify", small_model, small_model),
        ("verify", trained / "iter_0000090", small_model),
    ):
        assert "means nothing" in refused(capsys, *args, "--iteration", "90")
    one = (trained / "iter_0000090", "--iteration")
    assert run_json(capsys, "inspect", *one, "90")["iteration"] == "90"
    assert "is the folder of one iteration" in refused(capsys, "inspect", *one, "91")
    with pytest.raises(InputError, match="folder of one iteration"):
        AutoBridge.get_hf_model_id_from_checkpoint(one[0], iteration=91)
    for word in ("-1", "1.5", "latest", "\u0661", "9" * 5000):
        assert main(["inspect", str(trained), f"--iteration={word}"]) == 2
        assert "not a number of an iteration" in capsys.readouterr().err


# --- run_config.yaml, and export by it ---


def test_a_record_of_another_program(
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NVIDIA's Megatron-Bridge writes a file of this name, with other contents."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint, folder)
    record = folder / folder_name(0) / CONFIG_RECORD
    record.write_text(OTHER_RECORD)
    found = run_json(capsys, "inspect", folder)
    assert found["hf_model_id"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert (found["config_record"], found["other_record"], found["architecture"]) == (
        False, True, None,
    )  # fmt: skip
    shown = printed(capsys, "inspect", folder)
    assert "config record of another program: the model is not described" in shown
    assert "hf_model_id Qwen/Qwen3-VL-2B-Instruct" in shown
    assert AutoBridge.get_hf_model_id_from_checkpoint(folder) == "Qwen/Qwen3-VL-2B-Instruct"
    for args in (("plan", folder), ("export", folder, NOWHERE)):
        message = refused(capsys, *args)
        assert f"{record}: a record of another program" in message
        assert "by --hf, as in --hf Qwen/Qwen3-VL-2B-Instruct, which the record names" in message
    assert run_json(capsys, "export", folder, tmp_path / "out", "--hf", small_model)["keys"] == 115
    record.unlink()
    assert "name its Hugging Face model by --hf\n" in refused(capsys, "export", folder, NOWHERE)
    assert AutoBridge.get_hf_model_id_from_checkpoint(folder) is None


def test_plan_by_a_reference(
    small_model: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint, folder)
    by_record = run_json(capsys, "plan", folder)
    (folder / folder_name(0) / CONFIG_RECORD).unlink()
    found = run_json(capsys, "plan", folder, "--hf", small_model)
    assert (by_record["origin"], found["origin"]) == ("checkpoint", "reference")
    assert found["side_files"] == run_json(capsys, "inspect", small_model)["side_files"]
    for same in ("hf", "megatron", "rows", "conversion", "left_out"):
        assert found[same] == by_record[same]
    assert "in the layout of --hf" in printed(capsys, "plan", folder, "--hf", small_model)
    assert "--hf is what a checkpoint is exported like" in refused(
        capsys, "plan", small_model, "--hf", small_model
    )
    assert "--revision is that of a hub id" in refused(capsys, "plan", folder, "--revision", "x")


def test_export_by_the_record(
    small_model: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights and config.json; the tokenizer is not in the checkpoint, and this is said."""
    out = tmp_path / "out"
    done = run_json(capsys, "export", small_checkpoint, out)
    assert (done["reference"], done["side_files"], done["left_out"]) == (None, ["config.json"], [])
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (small_model / "config.json").read_text()
    )
    assert main(["verify", str(out), str(small_model)]) == 0
    capsys.readouterr()
    shown = printed(capsys, "export", small_checkpoint, out, "--force")
    assert "side files config.json, and no others (tokenizer, processor): --hf takes them" in shown
    whole = run_json(capsys, "export", small_checkpoint, tmp_path / "whole", "--hf", small_model)
    assert whole["reference"] == str(small_model)
    assert "tokenizer_config.json" in whole["side_files"]
    assert "is not quantized" in refused(capsys, "export", small_checkpoint, NOWHERE, "--fp8")
    assert "--revision is that of a hub id" in refused(
        capsys, "export", small_checkpoint, NOWHERE, "--revision", "x"
    )


def test_what_no_reference_gives_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that was trained without its MTP layer."""
    model, folder = make_model("qwen3.5", tmp_path / "model"), tmp_path / "checkpoint"
    AutoBridge.import_ckpt(model, tmp_path / "whole")
    whole = TorchDistCheckpoint(tmp_path / "whole")
    tensors = {k: t for k, t in whole.tensors.items() if not k.startswith("language_model.mtp.")}
    assert len(tensors) < len(whole.tensors)
    write_torch_dist(folder, tensors, whole.read_into)
    shutil.copy(whole.folder / CONFIG_RECORD, folder)
    planned = run_json(capsys, "plan", folder)["left_out"]
    done = run_json(capsys, "export", folder, tmp_path / "out")
    names = {name for name in TensorIndex.from_folder(model) if name.startswith("mtp.")}
    assert names == set(done["left_out"]) == set(planned)
    assert (
        TensorIndex.from_folder(tmp_path / "out").keys() | names
        == TensorIndex.from_folder(model).keys()
    )
    shown = printed(capsys, "export", folder, tmp_path / "again")
    assert (
        f"left out {len(names)} tensors that config.json names and nothing at hand holds" in shown
    )
    assert "left out" in printed(capsys, "plan", folder)
    with_reference = run_json(capsys, "export", folder, tmp_path / "all", "--hf", model)
    assert (with_reference["left_out"], set(with_reference["carried"])) == ([], names)


def test_dtypes_are_those_of_the_checkpoint(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where one tensor has another than most, which no config tells."""
    stored = TorchDistCheckpoint(small_checkpoint)
    key = "language_model.decoder.final_layernorm.weight"
    tensors = dict(stored.tensors)
    tensors[key] = type(tensors[key])(key, tensors[key].shape, "F32")

    def fill(name: str, box: Box, out: Array) -> None:
        put(stored.read(name, box).to(torch_dtype(tensors[name].dtype)), out)

    write_torch_dist(tmp_path / "checkpoint", tensors, fill)
    shutil.copy(stored.folder / CONFIG_RECORD, tmp_path / "checkpoint")
    run_json(capsys, "export", tmp_path / "checkpoint", tmp_path / "out")
    index = TensorIndex.from_folder(tmp_path / "out")
    assert {name: info.dtype for name, info in index.items() if info.dtype != "BF16"} == {
        "model.language_model.norm.weight": "F32"
    }
