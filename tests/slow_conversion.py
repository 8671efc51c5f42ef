"""Conversions of many small pieces that take their time, for tests that end them early."""

import time
from pathlib import Path

import torch.distributed.checkpoint.metadata  # noqa: F401 - so that a process started has it

from megatron.bridge.checkpoint.convert import Converted, export_checkpoint, import_checkpoint
from megatron.bridge.checkpoint.run import Run
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

MEMORY = 4500 << 10
"""So small that pieces are, and that there are many of them."""

SHARD_BYTES = 1 << 20


def convert(
    direction: str, folder: Path, out: Path, *, resume: bool = False, seconds: float = 0
) -> Converted:
    """Convert `folder`/hf or `folder`/megatron to `out`; wait `seconds` after every piece."""
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    run = Run(memory=MEMORY, max_shard_bytes=SHARD_BYTES, resume=resume, progress=Slow(seconds))
    if direction == "import":
        return import_checkpoint(hf, out, run=run)
    return export_checkpoint(folder / "megatron", out, hf, run=run)


class Slow:
    """A Progress that waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def start(self, task: str, total_bytes: int) -> None:
        """Nothing to wait for."""

    def advance(self, done_bytes: int) -> None:
        """A piece is done."""
        time.sleep(self._seconds)
