"""A target against its own checksums: every changed byte is found, and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron.bridge.errors import CheckpointError, InputError, ReferenceNotFound
from megatron.bridge.formats.torch_dist.metadata import read_metadata
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.operations.verification.fast import verify_fast
from megatron.bridge.operations.verification.report import FastReport
from megatron.bridge.target.record import MANIFEST_FILE
from megatron.bridge.target.run import Run
from written_pieces import flip_a_bit

MEMORY = 5 << 20
"""So little that files have many pieces."""

KEY = "language_model.decoder.layers.mlp.linear_fc2.weight"
NAME = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ("source"), imported ("imported") and exported again ("exported")."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(small_model, folder / "source")
    source = PreTrainedVLM.from_pretrained(folder / "source")
    import_checkpoint(source, folder / "imported", run=Run(memory=MEMORY))
    run = Run(memory=MEMORY, keep_manifest=True)
    export_checkpoint(folder / "imported", folder / "exported", source, run=run)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(made, tmp_path / "copied")


def changed(report: FastReport) -> dict[str, str]:
    assert not report.identical
    return {found.file: found.problem for found in report.different}


# --- nothing changed ---


def test_what_was_written_is_there(made: Path) -> None:
    report = verify_fast(made / "imported")
    assert report.identical
    assert (report.target.format, report.converted_from) == ("megatron", None)
    names = {path.name for path in (made / "imported").rglob("*") if path.is_file()}
    assert report.files == len(names - {MANIFEST_FILE})
    assert verify_fast(made / "imported" / "iter_0000000").identical
    exported = verify_fast(made / "exported")
    assert exported.identical
    assert exported.target.format == "huggingface"
    assert exported.bytes == sum(
        path.stat().st_size for path in (made / "exported").iterdir() if path.name != MANIFEST_FILE
    )


def test_the_source_is_recognised_in_either_order(made: Path) -> None:
    for source, target in (("source", "imported"), ("imported", "exported")):
        for pair in ((made / source, made / target), (made / target, made / source)):
            report = verify_fast(*pair)
            assert report.identical
            assert report.converted_from is not None
            assert report.target.source == str(made / target)
            assert report.converted_from.source == str(made / source)


def test_the_source_is_not_read(copied: Path) -> None:
    """All its tensors change, and nothing that is looked at."""
    for path in (copied / "source").glob("*.safetensors"):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        flip_a_bit(path, path.stat().st_size - 1)
        os.utime(path, ns=times)
    assert verify_fast(copied / "source", copied / "imported").identical


# --- the target changed ---


def test_a_changed_byte_of_torch_dist_is_found_with_its_tensor(copied: Path) -> None:
    folder = copied / "imported" / "iter_0000000"
    place = [chunk for chunk in read_metadata(folder).chunks if chunk.key == KEY][-1]
    offset = place.offset + place.length // 2
    flip_a_bit(folder / place.file, offset)
    report = verify_fast(copied / "imported")
    assert not report.identical
    (found,) = report.different
    assert found.file == f"iter_0000000/{place.file}"
    assert found.offset <= offset < found.offset + found.bytes
    assert found.bytes < (folder / place.file).stat().st_size / 4
    assert "CRC-32" in found.problem
    assert KEY in found.tensors
    assert len(found.tensors) < 10


def test_a_changed_byte_of_safetensors_is_found_with_its_tensor(copied: Path) -> None:
    info = TensorIndex.from_folder(copied / "exported")[NAME]
    flip_a_bit(info.file, info.offset + info.nbytes - 1)
    (found,) = verify_fast(copied / "exported", copied / "imported").different
    assert found.file == info.file.name
    assert found.offset <= info.offset + info.nbytes - 1 < found.offset + found.bytes
    assert NAME in found.tensors
    assert len(found.tensors) < 30


def test_a_range_without_tensors_names_none(copied: Path) -> None:
    config = copied / "exported" / "config.json"
    config.write_text(config.read_text().replace("1", "2", 1))
    (found,) = verify_fast(copied / "exported").different
    assert (found.file, found.tensors) == ("config.json", ())


def test_a_damaged_index_is_reported_and_names_no_tensors(copied: Path) -> None:
    folder = copied / "imported" / "iter_0000000"
    flip_a_bit(folder / ".metadata", 0)
    flip_a_bit(folder / "__0_0.distcp", 99_999)
    found = verify_fast(copied / "imported").different
    assert [(one.file, one.tensors) for one in found] == [
        ("iter_0000000/.metadata", ()),
        ("iter_0000000/__0_0.distcp", ()),
    ]


def test_missing_and_cut_files_are_found(copied: Path) -> None:
    first, second = sorted((copied / "exported").glob("*.safetensors"))[:2]
    first.unlink()
    with second.open("r+b") as file:
        file.truncate(second.stat().st_size - 3)
    (copied / "exported" / "tokenizer.json").write_text("")
    problems = changed(verify_fast(copied / "exported"))
    assert problems.keys() == {first.name, second.name, "tokenizer.json"}
    assert problems[first.name] == "missing"
    assert "size" in problems[second.name]


def test_a_checkpoint_that_was_trained_on_is_not_what_was_written(copied: Path) -> None:
    (copied / "imported" / "latest_checkpointed_iteration.txt").write_text("7")
    assert set(changed(verify_fast(copied / "imported"))) == {"latest_checkpointed_iteration.txt"}


# --- the source changed ---


def test_a_modified_source_is_named(copied: Path) -> None:
    os.utime(copied / "source" / "config.json", ns=(1, 1))
    (copied / "source" / "model-00002-of-00003.safetensors").unlink()
    report = verify_fast(copied / "source", copied / "imported")
    assert not report.identical
    assert report.different == []
    assert report.source_changes == [
        "config.json: modified",
        "model-00002-of-00003.safetensors: missing",
    ]


def test_a_modified_checkpoint_is_named(copied: Path) -> None:
    (data,) = (copied / "imported" / "iter_0000000").glob("*.distcp")
    os.utime(data, ns=(1, 1))
    for pair in (("exported", "imported"), ("imported", "exported")):
        report = verify_fast(*(copied / name for name in pair))
        assert report.source_changes == [f"{data.name}: modified"]


def test_something_else_than_the_source_is_not_taken_for_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "source", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    report = verify_fast(tmp_path / "other", made / "imported")
    assert [change.partition(":")[0] for change in report.source_changes] == ["config.json"]
    # What an export came from is a checkpoint, not the model that the checkpoint came from.
    report = verify_fast(made / "source", made / "exported")
    assert report.source_changes == ["it is a Hugging Face model"]
    with pytest.raises(ReferenceNotFound):
        verify_fast(tmp_path / "nowhere", made / "imported")


# --- nothing to compare with ---


def test_without_a_manifest_there_is_nothing_to_compare_with(made: Path, copied: Path) -> None:
    (copied / "imported" / MANIFEST_FILE).unlink()
    for sides in ([copied / "imported"], [made / "source", copied / "imported"]):
        with pytest.raises(InputError, match=r"without --fast") as raised:
            verify_fast(*sides)
        assert all(str(side) in str(raised.value) for side in sides)


def test_a_manifest_of_another_kind_is_refused(copied: Path) -> None:
    path = copied / "imported" / MANIFEST_FILE
    head, *files = path.read_text().splitlines()
    manifest = json.loads(head)
    manifest["job"]["command"] = "quantize"
    path.write_text("\n".join([json.dumps(manifest), *files, ""]))
    with pytest.raises(CheckpointError, match="'quantize'"):
        verify_fast(copied / "imported")
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="manifest"):
        verify_fast(copied / "imported")
