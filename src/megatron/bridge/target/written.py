"""Whether what a conversion wrote is what it should have written, read back from the files."""

from __future__ import annotations

from megatron.bridge.engine.comparison import compare_tensors
from megatron.bridge.errors import MismatchError
from megatron.bridge.target.run import ReadBack

_SHOWN = 20


def check_written(written: ReadBack) -> None:
    """Compare all tensors bit by bit. Raises MismatchError that names those that differ."""
    found = compare_tensors(
        written.tensors,
        written.found,
        written.expected,
        written.budget,
        written.progress,
        rows_multiple=written.rows_multiple,
    )
    wrong = [name for name, difference in found.items() if difference.elements]
    if wrong:
        names = "".join(f"\n  - {name}" for name in wrong[:_SHOWN])
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise MismatchError(
            f"{len(wrong)} tensors read back are not what was written; the disk or the memory of "
            f"this machine is not reliable{names}{more}"
        )
