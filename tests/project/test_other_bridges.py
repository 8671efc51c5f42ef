"""Another project's `megatron.bridge` is told when this one is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron.bridge
from megatron.bridge.other_bridges import MEANT, check_places

SOURCE = Path(megatron.bridge.__file__).parents[2]
OWN = SOURCE / "megatron" / "bridge"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "other" / "megatron" / "bridge"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('"""Somebody else\'s."""\n')
    return folder


def imported(path: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import megatron.bridge as found; print(found.__file__)"
    paths = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )


def test_both_places_are_told(other: Path) -> None:
    done = imported([SOURCE, other.parents[1]])
    assert done.returncode == 1
    message = done.stderr.partition("ImportError: ")[2]
    assert message.count("\n") == 4
    assert f"  {OWN}, which is megatron-bridge-vl and comes first\n" in message
    assert f"  {other}, another project's\n" in message
    assert message.endswith(f"set {MEANT}={OWN}\n")


def test_the_environment_says_which_is_meant(other: Path) -> None:
    done = imported([SOURCE, other.parents[1]], **{MEANT: str(OWN)})
    assert (done.stdout, done.returncode) == (f"{OWN / '__init__.py'}\n", 0)
    assert imported([SOURCE, other.parents[1]], **{MEANT: str(other)}).returncode == 1


def test_a_copy_of_this_project_is_no_other(other: Path) -> None:
    (other / "__init__.py").write_text((OWN / "__init__.py").read_text())
    check_places(str(OWN), megatron.bridge.__doc__ or "", [str(other.parent)])
    check_places(str(OWN), "", [str(SOURCE / "megatron"), str(other.parents[2])])


def test_two_in_one_folder(other: Path) -> None:
    (other / "package_info.py").touch()
    with pytest.raises(ImportError, match=rf"into one folder, {other}, .* install one of them"):
        check_places(str(other), "Somebody else's.", [])
