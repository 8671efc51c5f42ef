"""A small model folder in memory, to be changed and written.

folder = Folder.of(model)
change(folder, random)          # see `folder_mutations`
folder.write(path)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LANGUAGE = "model.language_model."
VISION = "model.visual."
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
HEAD = "lm_head.weight"

QWEN3_5 = frozenset({"qwen3_5", "qwen3_5_moe"})
DENSE_3_5 = frozenset({"qwen3_5"})
MOE = frozenset({"qwen3_vl_moe", "qwen3_5_moe"})
ALL = QWEN3_5 | {"qwen3_vl", "qwen3_vl_moe"}

type Tensors = dict[str, torch.Tensor]


@dataclass
class Folder:
    """A model folder in memory: changed, then written.

    shards: file -> names of its tensors. index: whether a weight index is written. beside: further
    safetensors files. edit: changes of the files once they are written.
    """

    config: dict[str, Any]
    tensors: Tensors
    side_files: dict[str, bytes]
    shards: dict[str, list[str]] = field(default_factory=dict)
    index: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Tensors] = field(default_factory=dict)
    edit: list[Callable[[Path], None]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Path) -> Folder:
        """A folder with one file of weights."""
        side = {
            path.name: path.read_bytes()
            for path in model.iterdir()
            if path.is_file() and path.name not in ("config.json", INDEX)
        }
        side = {name: data for name, data in side.items() if not name.endswith(".safetensors")}
        return cls(json.loads((model / "config.json").read_text()), read_tensors(model), side)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @property
    def text(self) -> dict[str, Any]:
        return self.config["text_config"]  # type: ignore[no-any-return]

    @property
    def vision(self) -> dict[str, Any]:
        return self.config["vision_config"]  # type: ignore[no-any-return]

    def any_of(self, random: Random, *parts: str) -> str:
        """The name of a tensor with one of these parts."""
        return random.choice([n for n in self.tensors if any(part in n for part in parts)])

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}

    def split(self, random: Random, *names: str) -> None:
        """Distribute the tensors over files of these names, with an index."""
        order = sorted(self.tensors)
        random.shuffle(order)
        self.shards = {name: order[number :: len(names)] for number, name in enumerate(names)}
        self.index = True

    def write(self, path: Path) -> Path:
        from safetensors.torch import save_file

        path.mkdir()
        for name, data in self.side_files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        (path / "config.json").write_text(json.dumps(self.config, indent=2))
        shards = self.shards or {SINGLE: list(self.tensors)}
        for file, names in shards.items():
            tensors = {name: self.tensors[name].contiguous().clone() for name in names}
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path / file, {"format": "pt"})
        for file, tensors in self.beside.items():
            save_file({n: t.clone() for n, t in tensors.items()}, path / file, {"format": "pt"})
        if self.index:
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            content = {
                "metadata": {"total_size": total} | self.metadata,
                "weight_map": {name: file for file, names in shards.items() for name in names},
            }
            (path / INDEX).write_text(json.dumps(content, indent=2))
        for change in self.edit:
            change(path)
        return path


def read_tensors(folder: Path) -> Tensors:
    """All tensors of the safetensors files in a folder that are the model's, by name."""
    from safetensors.torch import load

    single = folder / SINGLE
    files = [single]
    if not single.exists():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    return {name: t for path in files for name, t in load(path.read_bytes()).items()}


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def noise(*shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).bfloat16()
