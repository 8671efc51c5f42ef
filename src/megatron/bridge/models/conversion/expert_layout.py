"""How routed experts can lie in files."""

from enum import StrEnum

from megatron.bridge.errors import InputError


class ExpertLayout(StrEnum):
    """Disk layouts of routed experts; shapes are those of gate_up and down."""

    FUSED = "fused"
    """One tensor for all experts: [E, 2I, H] and [E, H, I]."""
    FUSED_TRANSPOSED = "fused-transposed"
    """One tensor for all experts: [E, H, 2I] and [E, I, H]."""
    PER_EXPERT = "per-expert"
    """Tensors of their own for each expert: gate and up [I, H], down [H, I]."""


def parse_expert_layout(name: str) -> ExpertLayout:
    """The layout of this name. Raises InputError, listing the names."""
    try:
        return ExpertLayout(name)
    except ValueError:
        raise InputError(
            f"{name!r} is not a valid disk layout of experts; expected {', '.join(ExpertLayout)}"
        ) from None
