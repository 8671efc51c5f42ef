"""What clients put around the chunks of a model, and the way back in."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron.bridge.errors import InputError

type Chunks = list[Any]
"""Modules of any class: mostly megatron-core's, or what a client wraps them in."""

PreWrapHook = Callable[[Chunks], Chunks | None]
"""Takes the chunks of a rank; returns those to go on with, or None for the same ones."""


def chunks_after(hook: PreWrapHook, chunks: Chunks) -> Chunks:
    """What a hook returns, or the chunks that it may have changed in place.

    Raises:
        InputError: it returns something else than as many modules as it got.
    """
    returned: Any = hook(chunks)
    if returned is None:
        return chunks
    if not isinstance(returned, (list, tuple)):
        found = f"an object of type {type(returned).__name__}"
    elif others := [one for one in returned if not isinstance(one, torch.nn.Module)]:
        found = f"a list with an object of type {type(others[0]).__name__}"
    elif len(returned) != len(chunks):
        found = f"a list of {len(returned)} modules"
    else:
        return list(returned)
    raise InputError(
        f"pre-wrap hook {getattr(hook, '__qualname__', hook)} returned {found}; expected a list of "
        f"as many modules as it got, {len(chunks)}, or None where it changed them in place"
    )


def unwrapped(model: Sequence[torch.nn.Module]) -> Chunks:
    """The chunks inside of megatron-core's wrappers and of others that hold one as `module`."""
    chunks = []
    for chunk in unwrap_model(list(model)):
        while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
            chunk = inner
        chunks.append(chunk)
    return chunks
