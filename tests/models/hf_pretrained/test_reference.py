"""Folders and hub ids, with the real hub client and no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron.bridge.errors import InputError, ReferenceNotFound
from megatron.bridge.models.hf_pretrained.reference import resolve_reference
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from model_folders import write_example

MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as the hub's client lays it out: two revisions, files linked to blobs."""
    repository = tmp_path / "hub" / "models--org--tiny-vl"
    write_example(tmp_path / "files")
    (tmp_path / "files" / "config.json").write_text("{}")
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(MAIN)
    (repository / "refs" / "v1").write_text(OLD)
    for commit in (MAIN, OLD):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted((tmp_path / "files").iterdir())):
            blob = repository / "blobs" / f"{number:064x}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    return repository


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_reference(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@x").mkdir(parents=True)
    assert resolve_reference("org/name@x") == tmp_path / "org" / "name@x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_reference("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    ("reference", "revision", "commit"),
    [
        ("org/tiny-vl", None, MAIN),
        ("org/tiny-vl", "v1", OLD),
        ("org/tiny-vl@v1", None, OLD),
        ("org/tiny-vl@v1", "v1", OLD),
        (f"org/tiny-vl@{OLD}", None, OLD),
    ],
)
def test_hub_id_in_the_cache(
    cache: Path, reference: str, revision: str | None, commit: str
) -> None:
    folder = resolve_reference(reference, revision)
    assert folder == cache / "snapshots" / commit
    with TensorIndex.from_folder(folder) as index:
        assert index.read("a.weight").shape == (5, 3)


def test_weights_are_of_the_same_commit_as_the_config(cache: Path) -> None:
    vlm = PreTrainedVLM.from_pretrained("org/tiny-vl@v1")
    assert vlm.folder == cache / "snapshots" / OLD
    (cache / "refs" / "v1").write_text(MAIN)  # the branch moves on
    assert vlm.weights_folder == vlm.folder
    assert vlm.tensors["a.weight"].shape == (5, 3)


@pytest.mark.parametrize("reference", ["org/unknown", "org/tiny-vl@v2"])
def test_hub_id_that_is_not_in_the_cache(cache: Path, reference: str) -> None:
    with pytest.raises(ReferenceNotFound) as caught:
        resolve_reference(reference)
    assert str(caught.value) == (
        f"{reference}: there is no such folder, it is not in the hub's cache, and HF_HUB_OFFLINE "
        "forbids fetching it; unset HF_HUB_OFFLINE, or give a folder"
    )


def test_hub_that_cannot_be_reached() -> None:
    code = (
        "from megatron.bridge.models.hf_pretrained.reference import resolve_reference\n"
        "from megatron.bridge.errors import ReferenceNotFound\n"
        "try: resolve_reference('org/unknown')\n"
        "except ReferenceNotFound as error: print(error)"
    )
    environment = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # the discard port: nobody listens
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    assert answer.stdout == (
        "org/unknown: there is no such folder, it is not in the hub's cache, and the hub cannot be "
        "reached; check the connection, or give a folder\n"
    )


@pytest.mark.parametrize(
    "reference",
    ["", "name", "/no/such/folder", "./org", "../org/name", "org/name/more", "org/na me", "~x/y",
     "org/", "org/..", "org/a--b", "ö/x"],
)  # fmt: skip
def test_neither_folder_nor_hub_id(reference: str) -> None:
    with pytest.raises(ReferenceNotFound):
        resolve_reference(reference)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ReferenceNotFound, match=f"give the folder that holds it, {tmp_path}"):
        resolve_reference(path)


@pytest.mark.parametrize(
    ("reference", "revision"), [(os.curdir, "v1"), ("org/tiny-vl@", None), ("org/x@v1", "v2")]
)
def test_revisions_that_mean_nothing(reference: str, revision: str | None) -> None:
    with pytest.raises(InputError, match="revision"):
        resolve_reference(reference, revision)
