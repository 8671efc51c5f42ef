"""Folders of other programs and formats: each is named, with a way out, by every command alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.bridge.auto_bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.errors import CheckpointError
from megatron.bridge.synthetic import make_model
from refusals import NOWHERE, refused

ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some one/base"})


def files(*names: str) -> Callable[[Path], None]:
    """Files of which nothing but the names is looked at."""

    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(ADAPTER if name == "adapter_config.json" else "not to be read")

    return make


def tensors(name: str) -> Callable[[Path], None]:
    """A safetensors file under another name than a model's."""

    def make(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 6)}, folder / name)

    return make


def both(*made: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [make(folder) for make in made] and None


STATE = files("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt")
"""What a trainer leaves beside weights; none of it is weights."""

FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "bin": (files("pytorch_model.bin"), ("pytorch_model.bin", "save_pretrained(")),
    "bin in shards": (
        files("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained("),
    ),
    "bin with a trainer's state": (both(STATE, files("model.bin")), (", model.bin;",)),
    "pt": (both(STATE, files("weights.pt")), ("weights.pt", "save_pretrained")),
    "pth": (files("weights.pth"), ("weights.pth",)),
    "gguf": (files("Model-Q4_K.GGUF"), ("GGUF", "Model-Q4_K.GGUF", "take the safetensors files")),
    "h5": (files("tf_model.h5"), ("TensorFlow",)),
    "msgpack": (files("flax_model.msgpack"), ("Flax",)),
    "onnx": (files("onnx/model.onnx"), ("ONNX",)),
    "original": (
        files("original/consolidated.00.pth", "original/params.json"),
        ("original/consolidated.00.pth", "in the layout of transformers"),
    ),
    "original safetensors": (tensors("consolidated.safetensors"), ("consolidated.safetensors",)),
    "DeepSpeed": (
        files("zero_to_fp32.py", "latest", "global_step40/mp_rank_00_model_states.pt"),
        ("DeepSpeed", "zero_to_fp32.py"),
    ),
    "adapter": (
        both(STATE, files("adapter_config.json"), tensors("adapter_model.safetensors")),
        ("adapter (LORA)", "'some one/base'", "merge_and_unload()"),
    ),
    "adapter in bin": (files("adapter_config.json", "adapter_model.bin"), ("adapter (LORA)",)),
    "adapter of nothing": (
        lambda folder: (folder / "adapter_config.json").write_text("{") and None,
        ("an adapter, not a whole model", "its base model"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("case", FOLDERS)
def test_model_folders(
    case: str,
    config: bool,
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The verdict of `import`, in the same words, wherever a model is read."""
    make, named = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    if config:
        shutil.copy(small_model / "config.json", folder)
    make(folder)
    message = refused(capsys, "import", folder, NOWHERE)
    assert [part for part in named if part not in message] == []
    assert str(folder) in message
    assert message.count("\n") == 1
    assert "download" not in message
    for args in (
        ("inspect", folder),
        ("plan", folder),
        ("plan", small_checkpoint, "--hf", folder),
        ("export", small_checkpoint, NOWHERE, "--hf", folder),
        ("verify", folder, small_checkpoint),
        ("compare", folder),
    ):
        assert refused(capsys, *args) == message
    bridge = AutoBridge.from_hf_pretrained(small_model)
    with pytest.raises(CheckpointError) as error:
        bridge.load_hf_weights([], folder)
    assert f"error: {error.value}\n" == message
    assert not AutoBridge.can_handle(folder)


def test_what_is_no_weights_leaves_a_config_alone(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(small_model / name, tmp_path)
    STATE(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events.pt").write_text("")
    assert main(["plan", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["origin"], found["proven"]) == ("config", True)


def test_what_lies_beside_safetensors_does_not_matter(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    files("pytorch_model.bin", "model.gguf", "original/consolidated.00.pth", "global_step4/x")(
        folder
    )
    assert main(["plan", str(folder)]) == 0
    assert "proven" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "model_class"),
    [("qwen3-vl", "Qwen3VLForConditionalGeneration"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_bin_is_converted_as_the_message_says(
    family: str, model_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the class of the model: another one loads a part of it, or nothing."""
    import torch
    import transformers

    from megatron.bridge.models.hf_pretrained.tensors import TensorIndex

    folder, new = tmp_path / "bin", tmp_path / "new"
    folder.mkdir()
    model = make_model(family, tmp_path / "model", {})
    shutil.copy(model / "config.json", folder)
    index = TensorIndex.from_folder(model)
    torch.save({name: index.read(name) for name in index}, folder / "pytorch_model.bin")
    message = refused(capsys, "import", folder, NOWHERE)
    advice = message.partition("transformers: ")[2].strip().replace("NEW_FOLDER", repr(str(new)))
    eval(advice, {model_class: getattr(transformers, model_class)})
    capsys.readouterr()
    assert main(["verify", str(new), str(model)]) == 0


def test_bin_without_a_class_in_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, said in enumerate(("[]", '["a b"]', '"X"', "[3]", "{")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "pytorch_model.bin").write_text("")
        (folder / "config.json").write_text(f'{{"architectures": {said}}}')
        message = refused(capsys, "import", folder, NOWHERE)
        assert "with CLASS_IN_ITS_CONFIG of transformers" in message


# --- where a Megatron checkpoint is read ---

OLDER: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "torch": (files("mp_rank_00/model_optim_rng.pt"), ("older format torch", "mp_rank_00")),
    "torch, of many ranks": (
        files(*(f"mp_rank_0{t}_00{p}/model_optim_rng.pt" for t in (0, 1) for p in (0, 1))),
        ("older format torch", "--ckpt-convert-format torch_dist"),
    ),
    "zarr": (
        files("metadata.json", "model.decoder.weight/.zarray", "model.decoder.weight/0.0"),
        ("zarr", "torch_dist"),
    ),
    "DeepSpeed": (files("mp_rank_00_model_states.pt"), ("DeepSpeed",)),
}


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "iteration"])
@pytest.mark.parametrize("case", OLDER)
def test_older_checkpoints(
    case: str,
    tracked: bool,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, named = OLDER[case]
    folder = tmp_path / "checkpoint"
    make(folder / "iter_0000100")
    if tracked:
        (folder / "latest_checkpointed_iteration.txt").write_text("100")
        args: tuple[Path | str, ...] = (folder,)
    else:
        args = (folder, "--iteration", "100")
    message = refused(capsys, "export", args[0], NOWHERE, "--hf", small_model, *args[1:])
    assert [part for part in named if part not in message] == []
    assert str(folder / "iter_0000100") in message
    assert message.count("\n") == 1
    assert refused(capsys, "inspect", *args) == message
    assert refused(capsys, "plan", *args) == message
    assert refused(capsys, "verify", args[0], small_model, *args[1:]) == message
    with pytest.raises(CheckpointError) as error:
        AutoBridge.get_hf_model_id_from_checkpoint(folder, iteration=100)
    assert f"error: {error.value}\n" == message
    assert "is a Megatron checkpoint" in refused(capsys, "import", folder, NOWHERE)


def test_the_folder_of_an_older_iteration(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files("mp_rank_00/model_optim_rng.pt")(tmp_path)
    for args in (("inspect",), ("plan",)):
        assert "older format torch" in refused(capsys, *args, tmp_path)
    assert "older format torch" in refused(capsys, "export", tmp_path, NOWHERE, "--hf", small_model)


# --- indexes of other formats, which can be shown ---


def save_with_torch(checkpoint: Path, prefix: str, target: Path) -> None:
    """A checkpoint of the same tensors, in torch's own format."""
    import torch.distributed.checkpoint as dcp

    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
    from megatron.bridge.tensors.boxes import full_box

    stored = TorchDistCheckpoint(checkpoint)
    weights = {
        f"{prefix}{key}": stored.read(key, full_box(spec.shape))
        for key, spec in stored.tensors.items()
    }
    dcp.save(weights, checkpoint_id=str(target), no_dist=True)


@pytest.mark.parametrize(
    ("prefix", "backend", "name", "named"),
    [
        ("model.module.", None, "fsdp_dtensor", ("model.module.", "save it as torch_dist")),
        ("model.module.", "fsdp_dtensor", "fsdp_dtensor", ("metadata.json names", "fsdp_dtensor")),
        ("model.", None, "torch DCP", ("begin with model.", "no metadata.json")),
        ("", "zarr", "zarr", ("'zarr'",)),
    ],
)
def test_other_indexes(
    prefix: str,
    backend: str | None,
    name: str,
    named: tuple[str, ...],
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "saved"
    save_with_torch(small_checkpoint, prefix, folder / "iter_0000100")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    if backend is not None:
        (folder / "iter_0000100" / "metadata.json").write_text(
            json.dumps({"sharded_backend": backend, "sharded_backend_version": 1})
        )
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["checkpoint_format"], shown["exportable"]) == (name, False)
    assert shown["megatron"]["keys"] == len(shown["tensors"]) == 44
    assert all(tensor["name"].startswith(prefix) for tensor in shown["tensors"])
    assert main(["inspect", str(folder)]) == 0
    assert f"Megatron checkpoint ({name})" in capsys.readouterr().out
    message = refused(capsys, "export", folder, NOWHERE, "--hf", small_model)
    assert [part for part in (name, *named) if part not in message] == []
    assert message.count("\n") == 1
    assert refused(capsys, "plan", folder, "--hf", small_model) == message
    assert refused(capsys, "plan", folder) == message
    assert refused(capsys, "export", folder, NOWHERE) == message
    assert refused(capsys, "verify", folder, small_model) == message
    assert refused(capsys, "verify", folder, small_checkpoint) == message


def test_a_newer_version(
    small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "iter_0000000" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sharded_backend_version": 2}))
    message = refused(capsys, "export", checkpoint, NOWHERE, "--hf", small_model)
    assert "names version 2, and version 1 is read" in message
    assert main(["inspect", str(checkpoint)]) == 0


def test_keys_of_something_else(
    small_model: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cause, not each tensor that is missing."""
    save_with_torch(small_checkpoint, "net.", tmp_path / "saved")
    for args in (
        ("export", tmp_path / "saved", NOWHERE, "--hf", small_model),
        ("plan", tmp_path / "saved", "--hf", small_model),
        ("verify", tmp_path / "saved", small_model),
    ):
        message = refused(capsys, *args)
        assert "none of its tensors has a key of this model" in message
        assert "found such as net." in message
        assert message.count("\n") == 1
