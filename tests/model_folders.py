"""Small model folders for the tests of reading: three shards and an index, made by safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
          "model-00003-of-00003.safetensors")  # fmt: skip
INDEX = "model.safetensors.index.json"


def example_tensors() -> dict[str, dict[str, Any]]:
    """File name -> name -> tensor: mixed dtypes, no two shapes alike, a scalar, an empty one."""
    import torch

    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        SHARDS[0]: {"a.weight": normal(5, 3), "a.bias": normal(7, dtype=torch.float32)},
        SHARDS[1]: {"b.weight": normal(2, 4, 6), "b.scale": normal(dtype=torch.float16)},
        SHARDS[2]: {
            "c.weight": normal(9, 2).to(torch.float8_e4m3fn),
            "c.empty": normal(0, 8),
            "c.steps": torch.arange(11),
        },
    }


def write_example(folder: Path) -> dict[str, Any]:
    """Write the sharded example; returns name -> tensor."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards = example_tensors()
    for file_name, tensors in shards.items():
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    everything = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    content = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in everything.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    (folder / INDEX).write_text(json.dumps(content))
    return everything


def edit_index(folder: Path) -> Any:
    """The parsed index; write it back with `write_json`."""
    return json.loads((folder / INDEX).read_text())


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file from a header as JSON text or object, without any check."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a model folder, by name."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def change_tensors(folder: Path, change: Callable[[str, Any], Any]) -> None:
    """Replace every tensor by ``change(name, tensor)``; all lie in one file then."""
    from safetensors.torch import save_file

    tensors = {name: change(name, tensor) for name, tensor in read_tensors(folder).items()}
    for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        path.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two folders hold the same tensors in the same dtypes, bit by bit."""
    import torch

    here, there = read_tensors(left), read_tensors(right)
    return here.keys() == there.keys() and all(
        tensor.dtype == there[name].dtype
        and tensor.shape == there[name].shape
        and torch.equal(tensor.view(torch.uint8), there[name].view(torch.uint8))
        for name, tensor in here.items()
    )
