"""What docs/reference/cli.md says of the JSON documents."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"


def documented_keys(heading: str) -> set[str]:
    """Keys in the first table behind a line of the documentation."""
    _, found, rest = DOCUMENTATION.read_text("utf-8").partition(f"\n{heading}\n")
    assert found, heading
    table = rest.lstrip("\n").partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return set(re.findall(r"`(\w+)`", " ".join(rows)))
