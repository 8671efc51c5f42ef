"""Megatron checkpoints that are damaged or hostile: refused by name, and no code of theirs runs."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron.bridge.checkpoint.torch_dist_metadata import read_metadata
from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
from megatron.bridge.errors import CheckpointError, PlanError
from megatron.bridge.models.conversion.boxes import full_box
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.synthetic import make_model

KEY = "language_model.decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_model("qwen3-vl", folder / "hf", {}, seed=8)
    import_checkpoint(PreTrainedVLM.from_pretrained(folder / "hf"), folder / "megatron")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good checkpoint to damage; its only iteration."""
    shutil.copytree(good / "megatron", tmp_path / "megatron")
    return tmp_path / "megatron" / "iter_0000000"


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        TorchDistCheckpoint(folder)
    return str(error.value)


class Runs:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


class RunsByName(Runs):
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self.marker)!r}, 'w')",))


@pytest.mark.parametrize("kind", [Runs, RunsByName])
def test_a_pickle_that_runs_code_is_refused(folder: Path, tmp_path: Path, kind: type[Runs]) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(kind(marker))
    pickle.loads(payload)
    assert marker.exists()  # it does run where it is let
    marker.unlink()
    (folder / ".metadata").write_bytes(payload)
    assert "refused to read it" in refusal(folder)
    assert not marker.exists()


def test_code_inside_of_a_real_index_is_refused(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    edit(folder, lambda metadata: setattr(metadata, "planner_data", Runs(marker)))
    assert "refused to read it" in refusal(folder)
    assert not marker.exists()


def test_code_inside_of_the_data_does_not_run(folder: Path, tmp_path: Path) -> None:
    """The objects beside the tensors are pickles too: they are never opened."""
    import io

    import torch

    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save([Runs(marker)], buffer)
    data = folder / "__0_0.distcp"
    checkpoint = TorchDistCheckpoint(folder)
    end = data.stat().st_size
    data.write_bytes(data.read_bytes() + buffer.getvalue())

    def redirect(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == KEY:
                info.offset, info.length = end, len(buffer.getvalue())

    edit(folder, redirect)
    del checkpoint
    checkpoint = TorchDistCheckpoint(folder)
    with pytest.raises(CheckpointError, match=KEY):
        checkpoint.read(KEY, full_box(checkpoint.tensors[KEY].shape))
    assert not marker.exists()


def test_another_pickle_is_no_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert "not the index of a torch_dist checkpoint" in refusal(folder)


def test_a_cut_index_is_refused(folder: Path) -> None:
    index = folder / ".metadata"
    index.write_bytes(index.read_bytes()[:-100])
    assert "refused to read it" in refusal(folder)


def test_no_index(folder: Path) -> None:
    (folder / ".metadata").unlink()
    assert ".metadata" in refusal(folder)


def test_cut_data_are_refused_before_reading(folder: Path) -> None:
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-4096])
    assert "__0_0.distcp ends before its data; the file is truncated" in refusal(folder)


def test_missing_data(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing" in refusal(folder)


@pytest.mark.parametrize("escape", ["../__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp"])
def test_data_outside_of_the_folder(folder: Path, escape: str) -> None:
    def redirect(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == KEY:
                info.relative_path = escape

    edit(folder, redirect)
    message = refusal(folder)
    assert f"{KEY}: its data should lie in the folder, not in '{escape}'" in message


def test_a_chunk_without_data(folder: Path) -> None:
    def forget(metadata: Any) -> None:
        gone = next(index for index in metadata.storage_data if index.fqn == KEY)
        del metadata.storage_data[gone]

    edit(folder, forget)
    assert f"{KEY}: no data stored for [" in refusal(folder)


def test_chunks_that_leave_a_gap(folder: Path) -> None:
    edit(folder, lambda metadata: metadata.state_dict_metadata[KEY].chunks.pop())
    message = refusal(folder)
    assert KEY in message
    assert "is not filled" in message


def test_data_of_another_shape_than_the_index_says(folder: Path) -> None:
    norm = "language_model.decoder.final_layernorm.weight"

    def swap(metadata: Any) -> None:
        infos = {index.fqn: info for index, info in metadata.storage_data.items()}
        for index in metadata.storage_data:
            if index.fqn == norm:
                metadata.storage_data[index] = infos["vision_model.patch_embed.proj.bias"]

    edit(folder, swap)
    checkpoint = TorchDistCheckpoint(folder)
    with pytest.raises(CheckpointError, match=f"{norm} should be .* by the index"):
        checkpoint.read(norm, full_box(checkpoint.tensors[norm].shape))


@pytest.mark.parametrize("word", ["12", "-1", "../../x", "", "0\n1"])
def test_a_wrong_tracker(folder: Path, word: str) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(word)
    assert "latest_checkpointed_iteration.txt" in refusal(folder.parent)


def test_a_key_too_few_and_one_too_many(good: Path, folder: Path, tmp_path: Path) -> None:
    def rename(metadata: Any) -> None:
        metadata.state_dict_metadata["stray.weight"] = metadata.state_dict_metadata.pop(KEY)
        for index in [index for index in metadata.storage_data if index.fqn == KEY]:
            new = type(index)("stray.weight", index.offset)
            metadata.storage_data[new] = metadata.storage_data.pop(index)

    edit(folder, rename)
    hf = PreTrainedVLM.from_pretrained(good / "hf")
    with pytest.raises(PlanError) as error:
        export_checkpoint(folder, tmp_path / "out", hf)
    assert [problem.split(":")[0] for problem in error.value.problems] == [KEY, "stray.weight"]
    assert not (tmp_path / "out").exists()


def test_optimizer_state_stays_behind_and_is_named(
    good: Path, folder: Path, tmp_path: Path
) -> None:
    state = "optimizer.state.exp_avg.stray"

    def add(metadata: Any) -> None:
        metadata.state_dict_metadata[state] = metadata.state_dict_metadata[KEY]
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == KEY:
                metadata.storage_data[type(index)(state, index.offset)] = info

    edit(folder, add)
    hf = PreTrainedVLM.from_pretrained(good / "hf")
    done = export_checkpoint(folder, tmp_path / "out", hf)
    assert done.dropped == (state,)
