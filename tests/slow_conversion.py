"""Conversions of many small pieces that take their time, for tests that end them early."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import Converted, export_checkpoint, import_checkpoint
from megatron.bridge.target.run import Run

MEMORY = 4500 << 10
"""So small that there is one thread, and many small pieces."""

SHARD_BYTES = 1 << 20


def convert(
    direction: str,
    folder: Path,
    out: Path,
    *,
    resume: bool = False,
    after_piece: Callable[[], object] = lambda: None,
) -> Converted:
    """Convert `folder`/hf or `folder`/megatron to `out`, by one thread.

    after_piece: called when a piece was written.
    """
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    run = Run(MEMORY, SHARD_BYTES, resume=resume, keep_manifest=True, progress=Hook(after_piece))
    if direction == "import":
        return import_checkpoint(hf, out, run=run)
    return export_checkpoint(folder / "megatron", out, hf, run=run)


def convert_slowly(direction: str, folder: Path, out: Path) -> None:
    """Wait for 3 ms after every piece."""
    convert(direction, folder, out, after_piece=partial(time.sleep, 0.003))


class Hook:
    """A Progress that calls a function."""

    def __init__(self, after_piece: Callable[[], object]) -> None:
        self._after_piece = after_piece

    def start(self, task: str, total_bytes: int) -> None:
        """Nothing to call."""

    def advance(self, done_bytes: int) -> None:
        """A piece is done."""
        self._after_piece()
