"""What a refusal looks like: exit status 2, one message, nothing written, a document by --json."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron.bridge.cli import main

NOWHERE = Path(os.devnull, "out")
"""A target that nobody can make: any other message than that was said before there was output."""


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The message of a command that is refused."""
    status = main([str(arg) for arg in args])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.startswith("error: ")
    assert status == 2, printed.err
    if "--json" in args:
        said = json.loads(printed.out)["error"]
        assert said["message"].partition("\n")[0] in printed.err
        assert said["exit_status"] == 2
    else:
        assert printed.out == ""
    assert all(char.isprintable() for char in printed.err.replace("\n", "")), printed.err
    return printed.err


def paths_below(folder: Path) -> list[str]:
    """Everything that lies in a folder, links not followed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def export_refused(checkpoint: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of `export`, which wrote nothing."""
    before = paths_below(checkpoint.parent)
    message = refused(capsys, "export", checkpoint, NOWHERE, "--hf", model)
    assert len(message) < 20_000
    assert paths_below(checkpoint.parent) == before
    return message
