"""A value head as a client brings it, and small models of the families that clients are run on."""

from pathlib import Path
from typing import Any

import torch

from megatron.bridge.synthetic import make_model

# Two ranks can share the heads of every part.
DENSE, EXPERTS = "qwen3.5", "qwen3-vl-moe"


def make_models(folder: Path) -> dict[str, Path]:
    """One dense hybrid model and one with experts, both with vision."""
    return {name: make_model(name, folder / name, seed=6) for name in (DENSE, EXPERTS)}


class LinearForLastLayer(torch.nn.Linear):
    """A client's own class: no parameter of it says how it is split."""

    def forward(self, input_: Any, weight: Any = None, runtime_gather_output: Any = None) -> Any:
        return super().forward(input_).float(), None


def put_value_head(chunks: list[Any]) -> None:
    """A pre-wrap hook: one value per token in the place of the logits."""
    for chunk in chunks:
        if chunk.language_model.post_process:
            old = chunk.language_model.output_layer.weight
            head = LinearForLastLayer(old.shape[1], 1, bias=False)
            chunk.language_model.output_layer = head.to(old.device, old.dtype)
