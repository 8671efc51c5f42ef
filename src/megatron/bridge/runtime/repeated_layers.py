"""Models on the meta device in which layers of the same kind are built once.

The layers of a large model are all alike but for a few kinds of them, and a layer with hundreds of
experts has thousands of modules. Where only the parameters are asked for, one of each kind tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe import experts


class RepeatedLayer(torch.nn.Module):
    """Stands for a layer, with its parameters by their names and none of its modules.

    Args:
        layer: one of the same kind, on the meta device.
        layer_number: of the layer that it stands for, as megatron-core counts.
    """

    def __init__(self, layer: torch.nn.Module, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        for name, parameter in layer.named_parameters():
            same = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
            vars(same).update(vars(parameter))  # what megatron-core notes on it
            self._parameters[name] = same

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: its keys are those of the layer that it stands for, but for the number."""
        return {}


@contextmanager
def repeated_experts() -> Iterator[None]:
    """Let the experts of a layer be one module; each has its own keys in a checkpoint."""
    made: dict[int, tuple[Any, torch.nn.Module]] = {}
    build = experts.MLP

    def build_once(config: Any, *args: Any, **given: Any) -> torch.nn.Module:
        # Each set of experts has a config of its own, and an id is one while its object is there.
        if id(config) not in made:
            made[id(config)] = config, build(config, *args, **given)
        return made[id(config)][1]

    experts.MLP = build_once
    try:
        yield
    finally:
        experts.MLP = build


@contextmanager
def repeated_layers() -> Iterator[None]:
    """Build blocks whose layers are RepeatedLayers, but for the first one of each kind.

    Layers are of one kind if megatron-core is given the same spec for them, and the same config.
    """
    build = transformer_block.build_module
    built: dict[tuple[int, int], tuple[int, Any]] = {}
    specs: list[Any] = []  # an id is one only while its object is there

    def build_once(spec: Any, *, config: Any, layer_number: int, **given: Any) -> Any:
        kind = (id(spec), id(config))
        if kind not in built:
            layer = build(spec, config=config, layer_number=layer_number, **given)
            built[kind] = (layer_number, layer)
            specs.append(spec)
            return layer
        number, layer = built[kind]
        # A layer knows its number in the whole model, and is told that on its stage.
        return RepeatedLayer(layer, layer.layer_number + layer_number - number)

    transformer_block.build_module = build_once
    try:
        yield
    finally:
        transformer_block.build_module = build
