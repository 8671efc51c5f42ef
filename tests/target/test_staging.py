"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.bridge.errors import TargetExists
from megatron.bridge.target.staging import staged_folder


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "target"
    with staged_folder(target) as folder:
        (folder / "file").write_text("new")
        assert not target.exists()
    assert listing(tmp_path / "parent") == ["target", "target/file"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "target") as folder:
            (folder / "file").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert listing(tmp_path) == []


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ValueError, match="stop"), staged_folder(target):
        raise ValueError("stop")
    assert listing(tmp_path) == ["target"]
    with staged_folder(target) as folder:
        (folder / "new").touch()
    assert listing(tmp_path) == ["target", "target/new"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(TargetExists, match="link exists"):
        staged_folder(tmp_path / "link").__enter__()


def test_files_that_are_no_weights_stay_where_that_is_wanted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name in ("config.json", "thesis.txt"):
        (target / name).write_text("old")
    for force in (False, True):
        name = f"{force}.json"
        if force:  # no model any more, so that it cannot be replaced
            (target / "config.json").unlink()
        with staged_folder(target, force=force, beside_files=True) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).touch()
        assert (target / "sub" / name).exists()
    assert (target / "thesis.txt").read_text() == "old"
    before = listing(tmp_path)
    with (
        pytest.raises(TargetExists, match="exists already; choose another folder"),
        staged_folder(target, beside_files=True) as folder,
    ):
        shutil.copytree(target, folder, dirs_exist_ok=True)
    assert listing(tmp_path) == before
    (target / "config.json").touch()
    (target / "model.safetensors").touch()
    with pytest.raises(TargetExists, match="target exists already; choose"):
        staged_folder(target, beside_files=True).__enter__()
    with staged_folder(target, force=True, beside_files=True) as folder:
        (folder / "new").touch()
    assert listing(tmp_path) == ["target", "target/new"]


def test_an_existing_model_is_replaced_by_force(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name in ("config.json", "old"):
        (target / name).touch()
    before = listing(tmp_path)
    with pytest.raises(TargetExists, match="target exists already"), staged_folder(target):
        pass
    with pytest.raises(ValueError, match="stop"), staged_folder(target, force=True):
        raise ValueError("stop")
    assert listing(tmp_path) == before
    with staged_folder(target, force=True) as folder:
        (folder / "new").touch()
    assert listing(tmp_path) == ["target", "target/new"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_anything_else_is_not_even_replaced_by_force(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").touch()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to("gone")
    before = listing(tmp_path)
    with pytest.raises(TargetExists, match="neither empty nor a model"):
        staged_folder(target, force=True).__enter__()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_that_cannot_be_renamed(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is back in its place, the new one is gone."""
    target = tmp_path / "target"
    if old:
        target.mkdir()
        (target / "config.json").touch()
    before = listing(tmp_path)
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), staged_folder(target, force=True) as folder:
        (folder / "file").touch()
    assert listing(tmp_path) == before


def test_a_target_that_appears_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(TargetExists, match="meanwhile"), staged_folder(target):
        (target / "file").mkdir(parents=True)
    assert listing(tmp_path) == ["target", "target/file"]


def test_a_killed_process_leaves_the_target_alone(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from megatron.bridge.target.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), force=True) as folder:\n"
        "    (folder / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old")
    killed = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert listing(target) == ["config.json"]
    assert all(path.name.startswith(".target.partial-") for path in tmp_path.iterdir()
               if path != target)  # fmt: skip
