"""Files in the page cache."""

import subprocess
from pathlib import Path

import pytest

from megatron.bridge.file_hints import cached_bytes


def skip_unless_known(folder: Path, descriptor: int) -> None:
    """Skip a test if one cannot say, or change, what is cached of an open file in this folder."""
    if cached_bytes(descriptor) is None:
        pytest.skip("the kernel does not say what is in the cache")
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("files in memory stay there")
