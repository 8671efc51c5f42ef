"""Activations by the names that Hugging Face's configs have for them."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

# torch's own functions, which megatron-core knows how to fuse and which need no import.
_OF_TORCH: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class NamedActivation:
    """What transformers computes for `hidden_act`, looked up when it is needed.

    A function, not a module: megatron-core would take a module for a part of the MLP that has
    weights to save.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.__name__ = name
        """megatron-core reads it, as every function has it."""

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of `x`, of the same shape and dtype."""
        result: Tensor = self._module(x)
        return result

    def problem(self) -> str | None:
        """Why it cannot be computed: no such name, or an activation with weights of its own."""
        from transformers.activations import ACT2FN

        if self.name not in ACT2FN:
            return f"transformers has no activation of that name, it has {sorted(ACT2FN)}"
        module = self._module
        if isinstance(module, nn.Module) and [*module.parameters(), *module.buffers()]:
            return "it has weights of its own, for which there is no place in the Megatron model"
        return None

    @cached_property
    def _module(self) -> Any:
        from transformers.activations import ACT2FN

        return ACT2FN[self.name]


def activation(name: str) -> Activation:
    """The activation of `hidden_act`. An unknown name is found by `activation_problem`."""
    return _OF_TORCH[name] if name in _OF_TORCH else NamedActivation(name)


def activation_problem(function: Activation) -> str | None:
    """Why a function that `activation` gave cannot be computed, None if it can."""
    return function.problem() if isinstance(function, NamedActivation) else None
