"""Targets that cannot be, said before anything is read, and paths that are the same everywhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.synthetic import make_model
from megatron.bridge.target import mounts, targets
from megatron.bridge.target.targets import check_target
from refusals import refused
from unfinished_target import complete, names, run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("", "an empty path was given"),
        (".", "is or holds the folder in which you are"),
        ("./", "is or holds the folder in which you are"),
        ("..", "cannot be a target"),
        ("a/..", "cannot be a target"),
        ("/", "cannot be a target"),
        ("a\nb", r"a\nb cannot be a target: its name holds control characters"),
        ("\x1b[2J", "its name holds control characters"),
        ("x" * 240, "its name has 240 bytes, at most 236"),
        ("m\0", "null character"),
    ],
)
def test_what_cannot_be_a_target(
    target: str, said: str, here: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (["import", small_model, target], ["make-model", "--family", "qwen3-vl", "--out"]):
        if args[0] == "make-model":
            args = [*args, target]
        if len(target) < 200 or args[0] == "make-model":
            assert said in refused(capsys, *args, "--force")
    with pytest.raises(InputError):
        AutoBridge.import_ckpt(small_model, target, force=True)
    assert names(here) == []


def test_the_folder_in_which_one_is(
    here: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "out" / "below").mkdir(parents=True)
    os.chdir(here / "out" / "below")
    for target in (here / "out", here / "out" / "below", "."):
        said = refused(capsys, "import", small_model, target, "--force")
        assert "the folder in which you are" in said
    assert Path.cwd().is_dir()


def test_a_home_is_not_replaced(
    here: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "home").mkdir()
    (here / "home" / "config.json").touch()
    monkeypatch.setenv("HOME", str(here / "home"))
    with pytest.raises(InputError, match="your home"):
        AutoBridge.import_ckpt(small_model, "~", force=True)


@pytest.mark.parametrize("place", ["out", "out/data", "out.partial"])
def test_a_mount_point(place: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""By the system's table, where names are escaped: a container's volume, from the same disk."""
    home = here / "with space"
    (home / place).mkdir(parents=True)
    escaped = str(home / place).replace(" ", r"\040")
    (here / "table").write_text(
        f"22 1 8:1 / / rw - ext4 /dev/a rw\n30 22 8:1 /v {escaped} rw - ext4 /dev/a rw\n"
    )
    monkeypatch.setattr(mounts, "_TABLE", here / "table")
    said = "is mounted in it" if place == "out/data" else "is a mount point, which cannot be"
    for force in (False, True):
        with pytest.raises(InputError, match=said):
            check_target(home / "out", [], force=force)
    check_target(home / "other", [], force=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_real_mount_point(
    here: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "volume").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "volume"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        said = refused(capsys, "import", small_model, "volume", "--force")
        assert "volume is a mount point" in said
        assert names(here) == ["volume"]
        assert main(["import", str(small_model), "volume/model"]) == 0
    finally:
        subprocess.run(["umount", "volume"], check=True)


def test_a_parent_that_is_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before a model is fetched from the hub."""
    (here / "file").touch()
    said = refused(capsys, "import", "org/name", here / "file" / "below" / "out")
    assert f"{here / 'file'} is not a folder" in said


def test_a_parent_that_is_read_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.os, "access", lambda path, mode: Path(path) != here)
    with pytest.raises(InputError, match="cannot be written to"):
        check_target(here / "a" / "out", [], force=True)


# --- what a killed run has replaced ---


def killed_in_between(here: Path) -> Path:
    """As a run with force leaves it that is killed between its two renamings."""
    run(here / "out", complete)
    replaced = here / ".out.replaced-0123abcd"
    (here / "out").rename(replaced)
    return replaced


def test_it_is_named(here: Path) -> None:
    replaced = killed_in_between(here)
    with pytest.raises(InputError, match=r"\.out\.replaced-0123abcd is what .*out was before"):
        run(here / "out", complete)
    replaced.rename(here / "out")
    assert names(here) == ["out"]


def test_force_removes_it(here: Path) -> None:
    killed_in_between(here)
    (here / ".out.replaced-mine").mkdir()
    (here / ".other.replaced-0123abcd").mkdir()
    run(here / "out", complete, force=True)
    assert names(here) == [".other.replaced-0123abcd", ".out.replaced-mine", "out"]


def test_one_that_cannot_be_removed_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(here / "out", complete)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "iter_1"))

    monkeypatch.setattr(targets.shutil, "rmtree", refuse)
    with pytest.raises(CheckpointError, match=r"out is complete; .* remove .*replaced-\w{8} you"):
        targets.publish(_folder(here / "new"), here / "out", force=True)
    assert sorted(path.name for path in (here / "out").iterdir()) == ["config.json"]


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").touch()
    return path


# --- one rule for paths ---


def test_a_home_is_meant_everywhere(
    here: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "small").symlink_to(small_model)
    assert main(["import", "~/small", "~/megatron"]) == 0
    assert main(["export", "~/megatron", "~/hf", "--hf", "~/small"]) == 0
    assert main(["verify", "~/hf", "~/megatron"]) == 0
    assert main(["verify", "~/megatron", "--fast"]) == 0
    assert main(["inspect", "~/megatron"]) == main(["plan", "~/hf"]) == 0
    assert main(["make-model", "--family", "qwen3-vl", "--out", "~/made"]) == 0
    capsys.readouterr()
    assert "~/nope.jpg" in refused(capsys, "compare", "~/hf", "--image", "~/nope.jpg")
    AutoBridge.import_ckpt("~/small", "~/megatron2")
    AutoBridge.from_hf_pretrained("~/small").export_ckpt("~/megatron2", "~/hf2")
    assert AutoBridge.get_hf_model_id_from_checkpoint("~/megatron") is None
    assert make_model("qwen3-vl", "~/made2") == home / "made2"
    assert names(here) == ["home"]
    assert set(names(home)) >= {"megatron", "hf", "made", "megatron2", "hf2", "made2"}


@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "import"])
def test_a_user_that_nobody_knows(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"verify": ["x"], "import": ["out"]}.get(command, [])
    assert "~nobody-at-all/x" in refused(capsys, command, "~nobody-at-all/x", *more)
    assert names(here) == []
