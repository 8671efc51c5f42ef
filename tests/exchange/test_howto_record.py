"""docs/howto/record-an-engine.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs/howto/record-an-engine.md").read_text("utf-8")


def test_the_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"<!-- executed by \S+ -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    [printed] = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "record-an-engine.md", "exec"), names)  # the page is ours
    assert capsys.readouterr().out == printed
    exec(compile(blocks[1], "record-an-engine.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "q_proj.weight ((8, 16), (0, 10)) (8, 10)",
        "k_proj.weight ((4, 8), (0, 10)) (4, 10)",
        "v_proj.weight ((4, 8), (0, 10)) (4, 10)",
    ]
