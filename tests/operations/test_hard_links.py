"""Exports whose files of weights are those of the reference: hard links to them, if asked for."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import Converted, export_checkpoint, import_checkpoint
from megatron.bridge.operations.verification.fast import verify_fast
from megatron.bridge.synthetic import make_model
from megatron.bridge.target.run import Run
from megatron.bridge.target.source_blocks import SourceBlocks
from unfinished_target import names, tree

UNCHANGED = "model-00001-of-00003.safetensors"
"""The file that has nothing of the language model."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model ("hf"), and its language model as a checkpoint of its own ("language")."""
    folder = tmp_path_factory.mktemp("made")
    settings = {"num_shards": 3}
    hf = PreTrainedVLM.from_pretrained(make_model("qwen3-vl", folder / "hf", settings, seed=4))
    import_checkpoint(hf, folder / "language", part="language")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return shutil.copytree(made, tmp_path / "folder")


def exported(folder: Path, **options: Any) -> Converted:
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    return export_checkpoint(
        folder / "language", folder / "out", hf, part="language", run=Run(**options)
    )


def links(folder: Path) -> list[str]:
    """The files that are those of the reference."""
    return [name for name in names(folder / "out") if (folder / "out" / name).stat().st_nlink > 1]


def test_only_where_it_is_asked_for(folder: Path) -> None:
    exported(folder)
    assert links(folder) == []
    assert tree(folder / "out") == tree(folder / "hf")


def test_what_is_the_same_becomes_a_link(folder: Path) -> None:
    done = exported(folder, hard_links=True, keep_manifest=True)
    assert links(folder) == [UNCHANGED]
    assert (folder / "out" / UNCHANGED).samefile(folder / "hf" / UNCHANGED)
    assert done.written.shared_bytes == (folder / "hf" / UNCHANGED).stat().st_size
    assert verify_fast(folder / "out").identical
    (folder / "out" / ".megatron-bridge.jsonl").unlink()
    assert tree(folder / "out") == tree(folder / "hf")


def test_a_link_leads_to_the_file_itself(folder: Path) -> None:
    """Files of the hub's cache are symlinks; one of these would lead nowhere from here."""
    blob = folder / "blob"
    (folder / "hf" / UNCHANGED).rename(blob)
    (folder / "hf" / UNCHANGED).symlink_to("../blob")
    exported(folder, hard_links=True)
    assert not (folder / "out" / UNCHANGED).is_symlink()
    assert (folder / "out" / UNCHANGED).samefile(blob)


def test_what_a_killed_run_linked_is_not_written_into(folder: Path) -> None:
    made_link = os.link

    def link(source: Path, path: Path) -> None:
        made_link(source, path)
        os.kill(os.getpid(), signal.SIGKILL)  # before it is recorded

    child = os.fork()
    if not child:
        try:
            os.link = link
            exported(folder, hard_links=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    left = folder / "out.partial" / UNCHANGED
    assert left.samefile(folder / "hf" / UNCHANGED)
    before = tree(folder / "hf")
    (folder / "hf" / UNCHANGED).chmod(0o400)
    exported(folder, resume=True)
    assert links(folder) == []
    assert (folder / "hf" / UNCHANGED).stat().st_nlink == 1
    assert tree(folder / "out") == tree(folder / "hf") == before


def test_a_link_that_cannot_be_made_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(InputError, match=r"^--hard-links.*cross-device.*leave the option out"):
        exported(folder, hard_links=True)
    assert names(folder) == ["hf", "language"]


def test_another_file_system_is_refused_before_anything_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == folder.stat().st_dev:
        pytest.skip("there is one file system alone")
    monkeypatch.setattr(SourceBlocks, "share", None)
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    with TemporaryDirectory(dir=elsewhere) as name:
        out, run = Path(name, "out"), Run(hard_links=True)
        with pytest.raises(InputError, match=r"^--hard-links.*cross-device.*leave the option out"):
            export_checkpoint(folder / "language", out, hf, part="language", run=run)
