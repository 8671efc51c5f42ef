"""Every bridge that ships here, by architecture."""

from collections.abc import Mapping

import megatron.bridge.models.qwen_vl  # noqa: F401  (its bridges register themselves)
from megatron.bridge.errors import UnsupportedModel
from megatron.bridge.models.conversion.model_bridge import (
    REGISTERED_BRIDGES,
    UNSUPPORTED,
    MegatronModelBridge,
)


def registered_bridges() -> Mapping[str, type[MegatronModelBridge]]:
    """Every bridge, those that a client registered included."""
    return REGISTERED_BRIDGES


def bridge_for(architecture: str) -> MegatronModelBridge:
    """The bridge of an architecture. Raises UnsupportedModel, listing what there is."""
    if architecture in UNSUPPORTED:
        raise UnsupportedModel(f"{architecture}: {UNSUPPORTED[architecture]}")
    bridge = REGISTERED_BRIDGES.get(architecture)
    if bridge is None:
        known = ", ".join(sorted(REGISTERED_BRIDGES))
        raise UnsupportedModel(
            f"{architecture}: no bridge converts it; there are bridges for {known}"
        )
    return bridge()
