"""What is damaged."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
