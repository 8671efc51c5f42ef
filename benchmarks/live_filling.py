"""Fill a live model as the README does, or only read its files; one process of the comparison.

    python -m benchmarks.live_filling FOLDER {fill,read}

Prints one JSON document: the seconds that the work took, without the imports, and the bytes of
what is in memory then.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from pathlib import Path

FILL, READ = "fill", "read"

_BLOCK = 8 << 20


def fill(folder: Path) -> tuple[float, int]:
    """Seconds from the folder to a model with all weights, and the bytes of its parameters."""
    import torch

    from megatron.bridge import AutoBridge

    began = time.perf_counter()
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    seconds = time.perf_counter() - began
    tensors: list[torch.Tensor] = [one for chunk in chunks for one in chunk.parameters()]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return seconds, sum(storages.values())


def read(folder: Path) -> tuple[float, int]:
    """Seconds to read the files into new memory, one block after the other, and their bytes."""
    began = time.perf_counter()
    memory = []
    for path in sorted(folder.glob("*.safetensors")):
        whole = mmap.mmap(-1, path.stat().st_size)
        into, place = memoryview(whole), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(into[place : place + _BLOCK]):
                place += count
        memory.append(whole)
    return time.perf_counter() - began, sum(map(len, memory))


def main() -> None:
    """Do what the arguments ask for."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    seconds, nbytes = {FILL: fill, READ: read}[what](folder)
    print(json.dumps({"seconds": seconds, "nbytes": nbytes}))


if __name__ == "__main__":
    main()
