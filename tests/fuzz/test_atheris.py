"""Every target that `make fuzz` runs works, and finds nothing in a few hundred inputs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.targets import TARGETS

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris has wheels for Linux on x86-64 only",
)
def test_targets(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-m", "fuzz", *TARGETS, "-runs=300", "-seed=1"],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("Done 300 runs") == len(TARGETS)
    assert not list(Path(tmp_path, "build", "fuzz").iterdir())
