"""Models in float64 throughout, to tell what they compute apart from how they round it.

A model in float64 still does parts of its work in float32, whatever the dtype of its weights:
norms, rotary angles, the gated delta rule. Here that is float64 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Where torch is asked for float32, it takes float64, and so it does where it may choose.

    That goes for dtypes given to functions of torch and for `Tensor.float()`. Tensors that exist
    keep their dtype: cast them before.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64ForFloat32():
            yield
    finally:
        torch.set_default_dtype(before)


def restore_frequencies(model: torch.nn.Module) -> None:
    """Compute the rotary frequencies of a transformers model again, without rounding to float32.

    They are buffers made with the model, so a cast of the model comes too late for them. A rope
    type whose frequencies depend on the length has one more, from which it restores the others.
    """
    with float64_throughout():
        for module in model.modules():
            names = [name for name, _ in module.named_buffers(recurse=False) if "inv_freq" in name]
            if "inv_freq" in names:
                exact = type(module)(module.config)
                for name in names:
                    setattr(module, name, getattr(exact, name))


class _Float64ForFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
