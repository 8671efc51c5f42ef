"""A refit of a released model from hundreds of ranks: what is said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import released_configs as released
from megatron.bridge.cli import main

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "refit.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "qwen3.5-397b").mkdir()
    config = folder / "qwen3.5-397b" / "config.json"
    config.write_text(json.dumps(released.QWEN3_5_397B_A17B))
    return folder


def test_the_run_of_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    page = HOWTO.read_text("utf-8")
    found = re.search(r"\$ megatron-bridge (plan .*--refit.*)\n  \.\.\.\n([^`]*)```", page)
    assert found is not None
    assert main(found[1].split()) == 0
    assert capsys.readouterr().out.endswith(found[2])
