"""Functions that megatron-core has compiled: without a GPU they run as they are written.

Compiling them takes a C++ compiler and its time. Handing them to `torch.compile` alone, which
megatron-core does when it is imported, takes seconds: all of torch's compiler is imported.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "megatron.core"


def compile_nothing(undo: ExitStack) -> None:
    """Let what is or was wrapped in `torch.compile` run as it is written, until `undo` is closed.

    It need not be: at the end of a process there is nothing left to be restored.
    """
    import torch

    undo.callback(setattr, torch, "compile", torch.compile)
    torch.compile = _as_written
    if "torch._dynamo" in sys.modules:  # without it, nothing was
        undo.enter_context(torch.compiler.set_stance("force_eager"))


def import_megatron_core_as_written() -> None:
    """Let the import of megatron-core, whoever asks for it, hand nothing to the compiler.

    On a machine with a GPU nothing changes.
    """
    if _NAME not in sys.modules and not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds megatron-core, once, where the others find it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _execute(execute, module)  # type: ignore[method-assign]
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    import torch

    # torch.cuda.is_available() may keep processes that are forked later from using CUDA.
    if torch.cuda.device_count():
        execute(module)
        return
    with ExitStack() as undo:
        compile_nothing(undo)
        execute(module)


def _as_written(model: Callable[..., Any] | None = None, **_options: Any) -> Any:
    """In the place of `torch.compile`, as a function and as a decorator with options."""
    return (lambda function: function) if model is None else model
