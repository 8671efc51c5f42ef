"""megatron-core's own saving, as its training loop calls it."""

from pathlib import Path
from typing import Any


def stock_save(state: Any, folder: Path, iteration: int = 7) -> Path:
    """Save a sharded state dict as one iteration of a checkpoint; returns its folder."""
    from megatron.core import dist_checkpointing

    from megatron.bridge.runtime.cpu import megatron_on_cpu

    inner = folder / f"iter_{iteration:07d}"
    inner.mkdir(parents=True)
    with megatron_on_cpu():
        dist_checkpointing.save(state, str(inner), async_strategy="mcore")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder
