"""Streams that cannot encode what is printed, that are full, or closed: what is done is done."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.bridge.cli import main
from refusals import refused
from unfinished_target import names


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        if text:
            raise OSError(28, "No space left on device")
        return 0


def streams(monkeypatch: pytest.MonkeyPatch, encoding: str) -> list[io.BytesIO]:
    raw = [io.BytesIO(), io.BytesIO()]
    for name, buffer in zip(("stdout", "stderr"), raw, strict=True):
        stream = io.TextIOWrapper(buffer, encoding=encoding, errors="strict", write_through=True)
        monkeypatch.setattr(sys, name, stream)
    return raw


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r"])
def test_letters_that_a_stream_does_not_know(
    encoding: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = streams(monkeypatch, encoding)
    model = tmp_path / "größe-模型"
    model.symlink_to(small_model)
    target = tmp_path / "naïve-Ж"
    assert main(["import", str(model), str(target)]) == 0
    assert main(["inspect", str(model)]) == main(["inspect", str(target)]) == 0
    assert main(["plan", str(model)]) == main(["verify", str(model), str(target)]) == 0
    shown = out.getvalue().decode(encoding)
    assert r"\u6a21\u578b" in shown
    assert "\n" in shown
    assert err.getvalue()
    assert main(["import", str(model), str(target)]) == 2
    assert main(["inspect", str(tmp_path / "模"), "--json"]) == 2
    assert r"\u6a21" in err.getvalue().decode(encoding)
    assert main(["--help"]) == main(["import", "--help"]) == 0
    assert sys.stdout.errors == sys.stderr.errors == "strict"  # as the caller had them


@pytest.mark.parametrize("how", ["closed", "fails"])
def test_an_stderr_that_takes_nothing(
    how: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress and messages are lost, and nothing else."""
    broken: io.TextIOBase = io.TextIOWrapper(io.BytesIO())
    if how == "closed":
        broken.close()
    else:
        broken = Full()
    monkeypatch.setattr(sys, "stderr", broken)
    assert main(["import", str(small_model), str(tmp_path / "out")]) == 0
    assert main(["import", str(small_model), str(tmp_path / "out")]) == 2
    assert main(["nonsense"]) == 2
    assert names(tmp_path) == ["out"]


def test_a_result_that_cannot_be_written(
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        for more in ([], ["--json", "--force"]):
            assert main(["import", str(small_model), str(tmp_path / "out"), *more]) == 2
            said = capsys.readouterr().err
            assert "error: the result could not be written to stdout: No space left" in said
            assert "run it again" not in said
    assert names(tmp_path) == ["out"]


def test_processes(tmp_path: Path) -> None:
    """A locale without letters; a help text that nobody reads, or that finds no room."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = f"{sys.executable} -m megatron.bridge"
    for command, status in (
        ("inspect 'größe/模型' 2>&1", 2),
        ("import --help | true", 141),
        ("--help >/dev/full", 2),
        ("inspect nothing 2>/dev/full", 2),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{program} {command}; exit ${{PIPESTATUS[0]}}"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
        )
        assert done.returncode == status, (command, done.stderr)
        assert b"Traceback" not in done.stderr + done.stdout


# --- wrong usage ---


@pytest.mark.parametrize(
    ("args", "said", "usage"),
    [
        (["import"], "Missing argument 'SRC'", "import [OPTIONS] SRC DST"),
        (["export", "a"], "Missing argument 'DST'", "export [OPTIONS] SRC DST"),
        (["verify", "a", "--fats"], "No such option '--fats'", "verify [OPTIONS] A [B]"),
        (["nonsense"], "No such command 'nonsense'", "[OPTIONS] COMMAND [ARGS]..."),
    ],
)
def test_wrong_usage_is_an_error_like_others(
    args: list[str], said: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *args)
    assert message.startswith(f"error: {said}")
    assert message.endswith(f"\nusage: megatron-bridge {usage}\n")
    assert message.count("\n") == 2


def test_the_help_has_no_braces(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "plan", "import", "export", "verify", "compare", "make-model"):
        assert main([command, "--help"]) == 0
        assert "{" not in capsys.readouterr().out
