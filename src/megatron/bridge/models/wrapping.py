"""What clients put around the chunks of a model, and the way back in."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron.bridge.errors import InputError

type Chunks = list[Any]
"""Modules of any class: mostly megatron-core's, or what a client wraps them in."""

ModelHook = Callable[[Chunks], Chunks | None]
"""Takes the chunks of a rank; returns those to go on with, or None for the same ones."""

type ModelHooks = ModelHook | Sequence[ModelHook]

MixedPrecisionWrapper = Callable[[Any, Any], torch.nn.Module]
"""Wraps a chunk: called with its config and the chunk, as megatron-core's Float16Module."""


class BuildKeywords(TypedDict, total=False):
    """The keywords of `ModelProvider.provide_distributed_model`, which says what each does."""

    ddp_config: DistributedDataParallelConfig | None
    wrap_with_ddp: bool
    seed: int
    fp16: bool | None
    bf16: bool | None
    use_megatron_fsdp: bool
    use_torch_fsdp2: bool
    overlap_param_gather_with_optimizer_step: bool
    data_parallel_random_init: bool
    use_cpu_initialization: bool | None
    init_model_with_meta_device: bool | None
    pre_wrap_hook: ModelHooks | None
    post_wrap_hook: ModelHooks | None
    mixed_precision_wrapper: MixedPrecisionWrapper | None
    pg_collection: ProcessGroupCollection | None


def as_hooks(hooks: ModelHooks | None) -> list[ModelHook]:
    """One hook, several or none, as a list."""
    if hooks is None:
        return []
    return [hooks] if callable(hooks) else list(hooks)


def chunks_after(hook: ModelHook, chunks: Chunks, kind: str) -> Chunks:
    """What a hook returns, or the chunks that it may have changed in place.

    Args:
        hook: is called.
        chunks: what it gets.
        kind: of the hook ("pre-wrap"), in messages.

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
        f"{kind} hook {getattr(hook, '__qualname__', hook)} returned {found}; expected a list of "
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
