"""Models between Hugging Face and Megatron-Core, both ways, exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import megatron
from megatron.bridge.other_bridges import check_places

check_places(__path__[0], __doc__ or "", megatron.__path__)

import megatron.bridge.runtime  # noqa: E402  (before megatron-core: silences it)

if TYPE_CHECKING:
    from megatron.bridge.auto_bridge import AutoBridge
    from megatron.bridge.live.hf_strategy import HuggingFaceStrategy

    __version__: str

__all__ = ["AutoBridge", "HuggingFaceStrategy", "__version__"]

_MODULES = {
    "AutoBridge": "megatron.bridge.auto_bridge",
    "HuggingFaceStrategy": "megatron.bridge.live.hf_strategy",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is asked for: the command line must answer at once."""
    if name == "__version__":
        from importlib.metadata import version

        return version("megatron-bridge-vl")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
