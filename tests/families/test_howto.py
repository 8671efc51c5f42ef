"""docs/howto/add-a-family.md: its code is that of the fifth family, and its commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from megatron.bridge.cli import main
from megatron.bridge.models import catalog
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import REGISTERED_BRIDGES, MegatronModelBridge
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.synthetic import make_model

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "howto" / "add-a-family.md").read_text("utf-8")


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_blank_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


@pytest.mark.parametrize("file", ["fifth_family.py", "fifth_provider.py"])
def test_the_code_is_that_of_the_family(file: str) -> None:
    part = PAGE.partition(f"test_howto.py: {file} -->")[2].partition("<!-- executed")[0]
    shown = "\n".join(blocks("python", part))
    assert without_blank_lines(shown) == without_blank_lines((HERE / file).read_text("utf-8"))


def test_the_bridge_needs_no_model() -> None:
    """Neither torch nor megatron-core is imported before a provider is."""
    script = "import sys, fifth_family; print({'torch', 'transformers'} & sys.modules.keys())"
    given = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": given},
    )
    assert done.stdout == "set()\n"


@pytest.mark.usefixtures("registered")
def test_the_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (console,) = blocks("console")
    commands = [one.partition("\n") for one in console.split("$ megatron-bridge ")[1:]]
    assert len(commands) == 7
    for line, _, output in commands:
        args = shlex.split(line, comments=True)
        assert main(args) == 0, line
        printed = capsys.readouterr().out
        if output:
            assert "".join(f"{row.rstrip()}\n" for row in printed.splitlines()) == output
    destroy_process_groups()


def test_an_installed_package_is_found(tmp_path: Path) -> None:
    """By its entry point, as the page has it; the commands know nothing else of it."""
    found = _run(_installed(tmp_path), "make-model", "--family", "llama", "--out", "small")
    assert found.returncode == 0, found.stderr
    found = _run(tmp_path, "inspect", "small")
    assert found.returncode == 0, found.stderr
    assert "LlamaBridge" in found.stdout


def test_a_family_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    _installed(tmp_path, "raise RuntimeError('too old\\n for this')\n")
    (tmp_path / "config.json").write_text('{"architectures": ["X"], "model_type": "x"}')
    found = _run(tmp_path, "inspect", str(tmp_path / "config.json"))
    assert found.returncode == 2
    assert found.stderr == (
        "error: the family llama of my-family cannot be imported from fifth_family: "
        "RuntimeError: too old\\n for this; mend that package, or uninstall it\n"
    )


def test_a_bridge_that_lacks_a_method_is_not_registered() -> None:
    """By the time that a command asks for it, nobody knows whose fault it is."""

    class Lacking(MegatronModelBridge):
        def mapping_registry(self) -> MegatronMappingRegistry:
            return MegatronMappingRegistry()

    register = MegatronModelBridge.register_bridge(source="X", target="y.Z")
    with pytest.raises(TypeError, match=r"^Lacking does not define provider_settings, structure$"):
        register(Lacking)
    assert "X" not in REGISTERED_BRIDGES


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("provider", ["fifth_provider.Nope", "nowhere.LlamaProvider"])
def test_a_provider_that_cannot_be_imported(
    provider: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model("llama", tmp_path / "small", {})
    monkeypatch.setattr(REGISTERED_BRIDGES["LlamaForCausalLM"], "provider", provider)
    assert main(["plan", str(model), "--tp", "1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: the provider {provider} of LlamaBridge cannot be imported: ")
    assert ("'Nope'" if "Nope" in provider else "'nowhere'") in message


def _installed(folder: Path, code: str | None = None) -> Path:
    """A folder as an installer leaves it, with the entry point of the page's pyproject.toml."""
    (toml,) = blocks("toml")
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.*)"\]\n(.*)\n', toml).groups()
    name, module = entry.split(" = ")
    info = folder / "my_family-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-family\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module.strip('"')}\n")
    for file in ("fifth_family.py", "fifth_provider.py"):
        (folder / file).write_text((HERE / file).read_text("utf-8") if code is None else code)
    return folder


def _run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return forked.run(_command, *args, cwd=folder, path=(folder,))


def _command(*args: str) -> int:
    """The command line in a process that has not yet looked for families."""
    catalog._import_families.cache_clear()
    return main(args)
