"""Megatron checkpoints that are damaged or hostile: refused by name, and no code of theirs runs."""

import io
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.errors import CheckpointError, PlanError
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.boxes import full_box

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
    """Change the index, which is ours and may be unpickled, as PyTorch's own classes."""
    index = folder / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


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


def put(folder: Path, blob: bytes, at: int | None = None, length: int | None = None) -> None:
    """Append `blob` to the data, and let the index say that KEY's first piece is there.

    at, length: what the index says of it instead of the truth; `at` is relative to the blob.
    """
    data = folder / "__0_0.distcp"
    begin = data.stat().st_size
    data.write_bytes(data.read_bytes() + blob)

    def redirect(metadata: Any) -> None:
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == KEY)
        info.relative_path = data.name
        info.offset = begin + (at or 0)
        info.length = len(blob) if length is None else length

    edit(folder, redirect)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def first_piece(folder: Path) -> torch.Tensor:
    """Of KEY, as it is stored."""
    [chunk, *_] = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata[KEY].chunks
    box = tuple((a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
    return TorchDistCheckpoint(folder).read(KEY, box)


def refusal_of_data(folder: Path) -> str:
    """What `locate` says; `read` refuses as well."""
    checkpoint = TorchDistCheckpoint(folder)
    with pytest.raises(CheckpointError, match=re.escape(KEY)):
        checkpoint.read(KEY, full_box(checkpoint.tensors[KEY].shape))
    checkpoint.locate(key for key in checkpoint.tensors if key != KEY)
    with pytest.raises(CheckpointError, match=re.escape(f"__0_0.distcp: {KEY}")) as error:
        checkpoint.locate([KEY])
    return str(error.value)


@pytest.mark.parametrize("kind", [Runs, RunsByName])
def test_code_inside_of_the_data_does_not_run(
    folder: Path, tmp_path: Path, kind: type[Runs]
) -> None:
    marker = tmp_path / "ran"
    blob = saved([kind(marker), first_piece(folder)])
    torch.load(io.BytesIO(blob), weights_only=False)
    assert marker.exists()
    marker.unlink()
    put(folder, blob)
    assert "its pickle names" in refusal_of_data(folder)
    assert not marker.exists()


def test_objects_are_never_opened(folder: Path, tmp_path: Path) -> None:
    """Their pickles are anybody's."""
    marker = tmp_path / "ran"
    put(folder, saved([Runs(marker), first_piece(folder)]))
    objects = TorchDistCheckpoint(folder).objects

    def swap(metadata: Any) -> None:
        infos = {index.fqn: info for index, info in metadata.storage_data.items()}
        hostile = next(info for index, info in metadata.storage_data.items() if index.fqn == KEY)
        vars(infos[objects[0]]).update(vars(hostile))
        for index in [index for index in metadata.storage_data if index.fqn == KEY]:
            del metadata.storage_data[index]
        del metadata.state_dict_metadata[KEY]

    edit(folder, swap)
    checkpoint = TorchDistCheckpoint(folder)
    checkpoint.locate(checkpoint.tensors)
    assert not marker.exists()


def test_a_plain_tensor_in_its_place_is_read(folder: Path) -> None:
    """So the refusals here are not of `put`."""
    tensor = first_piece(folder) + 1
    put(folder, saved(tensor))
    assert torch.equal(first_piece(folder), tensor)


def test_data_of_another_kind(folder: Path) -> None:
    put(folder, saved({"a": first_piece(folder)}))
    assert "it is no tensor but another object" in refusal_of_data(folder)


def test_strided_data(folder: Path) -> None:
    """Elements in another order are found; not those of which some lie in two places."""
    tensor = first_piece(folder) + 1
    put(folder, saved(tensor.transpose(-1, -2).contiguous().transpose(-1, -2)))
    assert torch.equal(first_piece(folder), tensor)
    put(folder, saved(tensor[..., :1].clone().expand(tensor.shape)))
    assert "whose elements lie one after the other" in refusal_of_data(folder)


def test_compressed_data(folder: Path) -> None:
    """Though nothing is gained by it, so that they are as long as they should be."""
    buffer = io.BytesIO()
    stored = zipfile.ZipFile(io.BytesIO(saved(first_piece(folder))))
    with stored, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name), compresslevel=0)
    put(folder, buffer.getvalue())
    assert "compressed" in refusal_of_data(folder)


def test_data_of_another_dtype(folder: Path) -> None:
    piece = first_piece(folder)
    put(folder, saved(piece.half()))
    assert f"should be BF16 of shape {tuple(piece.shape)} by the index" in refusal_of_data(folder)


def test_data_of_another_shape(folder: Path) -> None:
    piece = first_piece(folder)
    put(folder, saved(piece.flatten()))
    assert f"the file holds BF16 of shape ({piece.numel()},)" in refusal_of_data(folder)


@pytest.mark.parametrize(("at", "longer"), [(1, -1), (0, -1), (0, -300), (-64, 64), (-1, 1)])
def test_places_that_are_not_those_of_the_data(folder: Path, at: int, longer: int) -> None:
    blob = saved(first_piece(folder))
    put(folder, blob, at, len(blob) + longer)
    if at < 0:  # bytes before a zip file are allowed, as of a program that unpacks itself
        TorchDistCheckpoint(folder).locate([KEY])
    else:
        assert refusal_of_data(folder)


def test_data_that_lie_outside_of_their_place(folder: Path) -> None:
    """The directory of the piece says that its data are in the piece before it."""
    blob = bytearray(saved(first_piece(folder)))
    struct.pack_into("<L", blob, blob.rindex(b"archive/data/0") - 4, 0xFFFFF000)
    put(folder, bytes(blob))
    assert "lies outside of it" in refusal_of_data(folder)


def test_data_that_are_cut_after_the_index_was_read(folder: Path) -> None:
    checkpoint = TorchDistCheckpoint(folder)
    for data in checkpoint.data_files:
        os.truncate(data, 100)
    with pytest.raises(CheckpointError, match="cut after its index was read"):
        checkpoint.read(KEY, full_box(checkpoint.tensors[KEY].shape))


def test_data_that_are_gone_after_the_index_was_read(folder: Path) -> None:
    checkpoint = TorchDistCheckpoint(folder)
    for data in checkpoint.data_files:
        data.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read(KEY, full_box(checkpoint.tensors[KEY].shape))


def test_links_to_data_are_followed(folder: Path, tmp_path: Path) -> None:
    data = folder / "__0_0.distcp"
    data.rename(tmp_path / "blob")
    data.symlink_to(tmp_path / "blob")
    checkpoint = TorchDistCheckpoint(folder)
    checkpoint.locate(checkpoint.tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", None),
        ("size", ("1", 2)),
        ("size", (1.5,)),
        ("size", (1,) * 70),
        ("properties", None),
        ("chunks", None),
        ("chunks", [1]),
        ("offsets", ("a",)),
        ("offsets", (0,)),
        ("sizes", (-1, 2, 3)),
    ],
    ids=str,
)
def test_a_damaged_entry(folder: Path, name: str, value: object) -> None:
    def damage(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[KEY]
        setattr(entry if hasattr(entry, name) else entry.chunks[0], name, value)

    edit(folder, damage)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("offset", "0"), ("offset", -5), ("length", 1.5), ("length", None)]
)
def test_a_damaged_place(folder: Path, name: str, value: object) -> None:
    def damage(metadata: Any) -> None:
        setattr(next(iter(metadata.storage_data.values())), name, value)

    edit(folder, damage)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("entries", [None, [1], {1: None}, {("a",): None}], ids=str)
def test_entries_that_are_no_entries(folder: Path, entries: object) -> None:
    edit(folder, lambda metadata: setattr(metadata, "state_dict_metadata", entries))
    assert str(folder) in refusal(folder)


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
