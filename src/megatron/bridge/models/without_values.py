"""Building models that are filled right away: their weights get no initial values.

Random numbers for a few billion weights take longer than reading these from a disk.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import init
from torch.overrides import TorchFunctionMode

from megatron.bridge.models.wrapping import Chunks

_DRAWING = frozenset(
    {
        init.uniform_,
        init.normal_,
        init.kaiming_uniform_,
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
    }
)
"""What modules of torch draw their weights with. Others of `init` are made of these."""


class _ParametersAreNotDrawn(TorchFunctionMode):
    """Leaves parameters as they are. Buffers, which no file fills, get their values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWING:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, torch.nn.Parameter):
                return tensor
        return func(*args, **kwargs)


def build_without_values(config: TransformerConfig, build: Callable[[], Chunks]) -> Chunks:
    """Build modules whose weights hold whatever their memory holds; buffers are complete.

    megatron-core's modules ask `perform_initialization` of their config, those of torch ask
    nothing.

    Args:
        config: of what is built. It is as it was afterwards, and so are its copies in the modules.
        build: makes the modules.
    """
    before = config.perform_initialization
    config.perform_initialization = False
    try:
        with _ParametersAreNotDrawn():
            chunks = build()
    finally:
        config.perform_initialization = before
    for module in (module for chunk in chunks for module in chunk.modules()):
        own = getattr(module, "config", None)
        if isinstance(own, TransformerConfig):
            own.perform_initialization = before
    return chunks
