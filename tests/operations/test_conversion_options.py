"""The options of a conversion: one type for the commands and for AutoBridge."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.cli.commands.convert import export_command, import_command
from megatron.bridge.errors import InputError, MismatchError, TargetExists
from megatron.bridge.operations.options import ConversionOptions, ExportKeywords, ImportKeywords
from megatron.bridge.target.run import Run
from unfinished_target import names, tree


def test_one_list_of_options() -> None:
    """What one way takes, the other takes, and each name means the same."""
    known = {field.name for field in fields(ConversionOptions)}
    assert set(get_type_hints(ImportKeywords)) | set(get_type_hints(ExportKeywords)) == known
    for command, keywords in (
        (import_command, ImportKeywords),
        (export_command, ExportKeywords),
    ):
        taken = set(inspect.signature(command).parameters)
        assert taken & known == set(get_type_hints(keywords))


def test_sizes_as_they_are_typed(small_model: Path, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(small_model, tmp_path / "a", max_shard_size="500KB", memory="5MB")
    AutoBridge.import_ckpt(small_model, tmp_path / "b", max_shard_size=500_000, memory=5_000_000)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(list((tmp_path / "a").rglob("*.distcp"))) > 5
    for name, size in (("memory", "lots"), ("max_shard_size", 0), ("memory", True)):
        with pytest.raises(
            InputError, match=rf"^{name} \(--{name.replace('_', '-')}\): .*is not a v"
        ):
            AutoBridge.import_ckpt(small_model, tmp_path / "c", **{name: size})
    assert names(tmp_path) == ["a", "b"]


def test_verify_looks_at_what_was_written(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: object) -> None:
        raise MismatchError("it differs")

    monkeypatch.setattr(Run, "_compare", differs)
    AutoBridge.import_ckpt(small_model, tmp_path / "megatron")
    bridge = AutoBridge.from_hf_pretrained(small_model)
    with pytest.raises(MismatchError):
        AutoBridge.import_ckpt(small_model, tmp_path / "out", verify=True)
    with pytest.raises(MismatchError):
        bridge.export_ckpt(tmp_path / "megatron", tmp_path / "out", verify=True)
    assert names(tmp_path) == ["megatron"]
    monkeypatch.undo()
    bridge.export_ckpt(tmp_path / "megatron", tmp_path / "out", verify=True, keep_manifest=True)
    assert (tmp_path / "out" / ".megatron-bridge.jsonl").exists()


def test_the_advice_of_an_error_can_be_followed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.bridge.target.folder.WORTH_KEEPING", 1)

    class Stops:
        def start(self, task: str, total_bytes: int) -> None:
            self.left = 30

        def advance(self, done_bytes: int) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    sizes: dict[str, Any] = {"memory": "5MB", "max_shard_size": "200kB"}
    with pytest.raises(KeyboardInterrupt):
        AutoBridge.import_ckpt(small_model, tmp_path / "out", progress=Stops(), **sizes)
    with pytest.raises(InputError, match=r"resume=True"):
        AutoBridge.import_ckpt(small_model, tmp_path / "out", **sizes)
    AutoBridge.import_ckpt(small_model, tmp_path / "out", resume=True, **sizes)
    assert names(tmp_path) == ["out"]
    with pytest.raises(TargetExists, match=r"force=True"):
        AutoBridge.import_ckpt(small_model, tmp_path / "out")
    AutoBridge.import_ckpt(small_model, tmp_path / "out", force=True)


def test_names_that_clients_use(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoBridge.import_ckpt(
        hf_model_id=str(small_model),
        megatron_path=str(tmp_path / "megatron"),
        trust_remote_code=False,
        torch_dtype=torch.bfloat16,
        device_map="cpu",
    )
    assert capsys.readouterr().err == ""
    bridge = AutoBridge.from_hf_config(json.loads((small_model / "config.json").read_text()))
    bridge.export_ckpt(
        str(tmp_path / "megatron"),
        str(tmp_path / "hf"),
        show_progress=True,
        strict=True,
        source_path=str(small_model),
    )
    assert tree(tmp_path / "hf") == tree(small_model)
    assert "export: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"torch_dtype": torch.float32}, "torch_dtype=torch.float32"),
        ({"device_map": "cuda:0"}, "device_map='cuda:0'"),
        ({"fp8": True}, "import_ckpt takes no option 'fp8'"),
        ({"low_cpu_mem_usage": True}, "'low_cpu_mem_usage'; its options: experts, part"),
        ({"revision": "main"}, "is a folder: a revision"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    options: dict[str, Any], said: str, small_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        AutoBridge.import_ckpt(small_model, tmp_path / "out", **options)
    assert said in str(error.value)
    assert names(tmp_path) == []
