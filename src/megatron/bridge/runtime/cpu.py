"""Stock megatron-core on a machine without a GPU.

megatron-core asks `torch.cuda` for the current device, for streams and events, and for the random
state of the device. Where CUDA is not available these few questions are answered for the CPU while
`megatron_on_cpu()` is active; where it is available nothing is touched, unless that is asked for.
What else training asks of a GPU has a file each: `device_names`, `expert_tokens`, `uneven_parts`,
`adam_state`.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from megatron.bridge.runtime.adam_state import checkpoints_of_torch_adam
from megatron.bridge.runtime.as_written import compile_nothing
from megatron.bridge.runtime.device_names import name_the_cpu
from megatron.bridge.runtime.expert_tokens import sorted_tokens_stay, splits_are_numbers
from megatron.bridge.runtime.quiet import DropMessage
from megatron.bridge.runtime.uneven_parts import parts_may_differ

_RANDOM_LOGGER = "megatron.core.tensor_parallel.random"


class _Event:
    """An event on a device that runs everything in order: nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream(_Event):
    """A stream on a device that runs everything in order."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _current_device() -> torch.device:
    """The CPU, or the device of an enclosing `with torch.device(...)`, such as "meta"."""
    return torch.get_default_device()


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _stays(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _patches() -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random

    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", _current_device),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "manual_seed", _manual_seed),
        (torch.Tensor, "cuda", _stays),
        (random, "_get_cuda_rng_state", _get_rng_state),
        (random, "_set_cuda_rng_state", _set_rng_state),
    ]
    if torch.cuda.is_available():
        # Streams stay real: some classes of megatron-core keep the first one that they make.
        return patches
    return [
        *patches,
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "default_stream", _Stream),
    ]


class _Runtime:
    """How often the context is entered, and what the outermost exit has to undo."""

    def __init__(self) -> None:
        self.depth = 0
        self.activated = False
        self.undo = contextlib.ExitStack()

    def enter(self) -> None:
        if self.depth == 0:
            for owner, name, replacement in _patches():
                self.undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, replacement)
            # The tracker warns when the CPU's random state moves inside the GPU's: here they are
            # one and the same.
            same_generator = DropMessage("CPU RNG state changed within GPU RNG context")
            logger = logging.getLogger(_RANDOM_LOGGER)
            logger.addFilter(same_generator)
            self.undo.callback(logger.removeFilter, same_generator)
            compile_nothing(self.undo)
            if not torch.cuda.is_available():  # nothing runs on the CPU where there is a GPU
                name_the_cpu(self.undo)
                splits_are_numbers(self.undo)
                sorted_tokens_stay(self.undo)
                parts_may_differ(self.undo)
                checkpoints_of_torch_adam(self.undo)
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.undo.close()


_runtime = _Runtime()


@contextlib.contextmanager
def megatron_on_cpu(*, even_with_cuda: bool = False) -> Iterator[None]:
    """Let megatron-core build, run and train models on the CPU inside this context.

    Re-entrant; the outermost exit restores `torch.cuda`. What is wrapped in `torch.compile` runs as
    it is written: a C++ compiler need not be there. While it is active `Tensor.cuda()` leaves a
    tensor where it is instead of raising. Not for use from several threads at once, since it
    replaces attributes of modules.

    Args:
        even_with_cuda: also where CUDA is available, for models on the meta device: megatron-core
            would make their parameters on the GPU. False does nothing there.
    """
    if torch.cuda.is_available() and not even_with_cuda:
        yield
        return
    _runtime.enter()
    try:
        yield
    finally:
        _runtime.leave()


def activate_megatron_on_cpu() -> None:
    """Stay in `megatron_on_cpu()` until the end of the process.

    A model that is handed to a training loop needs it beyond any block of ours: the backward pass
    of tensor-parallel layers and of recomputation asks `torch.cuda` too.
    """
    if not torch.cuda.is_available() and not _runtime.activated:
        _runtime.activated = True
        _runtime.enter()
