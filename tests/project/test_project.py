"""The project's own files agree with each other and with what CONTRIBUTING promises."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "megatron" / "bridge"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON_VERSION = (ROOT / ".python-version").read_text().strip()
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()

REGISTRY = re.compile(
    r"https?://[^\s\"'<>)]*(?:pypi|pythonhosted|/simple\b|devpi|artifactory|nexus|mirror)"
    r"|--(?:extra-index|index|find-links|trusted-host)\b"
    r"|(?:PIP|UV)_(?:EXTRA_)?INDEX_URL"
    r"|--hash[=]"
)


def project_files() -> list[Path]:
    """Text files that are, or would be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Contents of the project's text files, by path relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in project_files()}


# --- Versions and dependencies -------------------------------------------------------------------


def test_constraints_are_names_and_versions_only() -> None:
    wrong = [
        line
        for line in CONSTRAINTS
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+!]*", line)
    ]
    assert wrong == []
    names = [canonicalize_name(line.partition("==")[0]) for line in CONSTRAINTS]
    assert len(names) == len(set(names))


def test_every_direct_dependency_has_a_constraint_in_its_range() -> None:
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in CONSTRAINTS)
    }
    direct = [
        *PYPROJECT["build-system"]["requires"],
        *PYPROJECT["project"]["dependencies"],
        *PYPROJECT["dependency-groups"]["dev"],
    ]
    for requirement in map(Requirement, direct):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement}: {version}"
        )


def test_python_versions_agree() -> None:
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(PYTHON_VERSION)
    assert PYPROJECT["tool"]["mypy"]["python_version"] == PYTHON_VERSION
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + PYTHON_VERSION.replace(".", "")


def test_installed_version_is_the_project_files() -> None:
    try:
        installed = metadata.version("megatron-bridge-vl")
    except metadata.PackageNotFoundError:
        pytest.skip("the project is not installed in this environment")
    assert installed == PYPROJECT["project"]["version"]


# --- Files ---------------------------------------------------------------------------------------


def test_no_file_names_a_package_registry(texts: dict[str, str]) -> None:
    found = [
        f"{name}: {match.group()}"
        for name, text in texts.items()
        for match in [REGISTRY.search(text)]
        if match
    ]
    assert found == []


def test_no_file_names_a_path_of_this_machine(texts: dict[str, str]) -> None:
    paths = [f"{path}/" for path in (ROOT, Path.home()) if len(path.parts) > 1]
    found = [
        f"{name}: {path}"
        for name, text in texts.items()
        for path in paths
        if re.search(rf"(?<![\w.]){re.escape(path)}", text)
    ]
    assert found == []


@pytest.mark.parametrize("name", [".ci/run", "scripts/find-python"])
def test_scripts_are_executable(name: str) -> None:
    assert (ROOT / name).stat().st_mode & stat.S_IXUSR


def test_megatron_is_a_namespace_and_its_parts_are_packages() -> None:
    # import-linter and the type checkers pass over a folder that has no __init__.py.
    assert not (PACKAGE.parent / "__init__.py").exists()
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_layouts_and_plans_import_no_megatron_core() -> None:
    # The import contracts see a whole distribution only, and megatron-core is a part of one name.
    program = """if True:
        import sys
        import megatron.bridge.models.conversion.layout
        import megatron.bridge.models.conversion.plan
        sys.exit(", ".join({"megatron.core", "transformers"} & set(sys.modules)) or None)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- scripts/find-python -------------------------------------------------------------------------


def find_python(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with `folder`/bin as the whole PATH and `folder` as the home."""
    (folder / "bin").mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "find-python")],
        env={"PATH": str(folder / "bin"), "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def write_script(file: Path, body: str) -> None:
    """Writes an executable shell script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


@pytest.fixture
def interpreter() -> str:
    """The path of a Python that is of the wanted version and not in a virtual environment."""
    if "{}.{}".format(*sys.version_info) != PYTHON_VERSION:
        pytest.skip(f"the tests do not run on Python {PYTHON_VERSION}")
    return getattr(sys, "_base_executable", sys.executable)


def test_nothing_found_is_one_line(tmp_path: Path) -> None:
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"No Python {PYTHON_VERSION} found: install it with ")


def test_another_version_or_a_broken_shim_is_passed_over(tmp_path: Path, interpreter: str) -> None:
    # A shim of pyenv is there for every version installed, and fails unless it is selected.
    write_script(tmp_path / "bin" / f"python{PYTHON_VERSION}", "echo not selected >&2; exit 127")
    write_script(tmp_path / "bin" / "python3", "exit 1")
    assert find_python(tmp_path).returncode == 1
    pyenv = tmp_path / ".pyenv" / "versions" / f"{PYTHON_VERSION}.1" / "bin"
    write_script(pyenv / f"python{PYTHON_VERSION}", f'exec "{interpreter}" "$@"')
    assert find_python(tmp_path).stdout == f"{interpreter}\n"
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / ".pyenv").rename(elsewhere)
    assert find_python(tmp_path).returncode == 1
    assert find_python(tmp_path, PYENV_ROOT=str(elsewhere)).stdout == f"{interpreter}\n"


def test_python_on_the_path(tmp_path: Path, interpreter: str) -> None:
    write_script(tmp_path / "bin" / "python", f'exec "{interpreter}" "$@"')
    assert find_python(tmp_path).stdout == f"{interpreter}\n"


def test_uv_is_asked_last_and_only_believed_when_it_runs(tmp_path: Path, interpreter: str) -> None:
    uv = tmp_path / "bin" / "uv"
    write_script(uv, f'[ "$*" = "python find --system {PYTHON_VERSION}" ] && echo "{interpreter}"')
    assert find_python(tmp_path).stdout == f"{interpreter}\n"
    write_script(uv, "echo /nowhere/python")
    done = find_python(tmp_path)
    assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (1, 0, 1)


def test_a_chosen_interpreter_must_work(tmp_path: Path, interpreter: str) -> None:
    assert find_python(tmp_path, PYTHON=interpreter).stdout == f"{interpreter}\n"
    done = find_python(tmp_path, PYTHON="/nowhere/python")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "/nowhere/python" in done.stderr
