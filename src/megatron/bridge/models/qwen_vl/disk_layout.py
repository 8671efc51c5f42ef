"""How routed experts lie in files: found from names and shapes, never guessed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.conversion.plan import TensorLike


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
            f"{name!r} is no disk layout of experts; expected {', '.join(ExpertLayout)}"
        ) from None


@dataclass(frozen=True)
class DiskLayout:
    """The layouts of one model's files; None where there are no such experts."""

    decoder: ExpertLayout | None = None
    mtp: ExpertLayout | None = None


@dataclass(frozen=True)
class ExpertSizes:
    """What shapes are told apart by: experts, hidden size, intermediate size of one expert."""

    experts: int
    hidden: int
    intermediate: int

    def shapes(self, layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
        """Shapes of the two fused tensors by the end of their names."""
        up, down = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        if layout is ExpertLayout.FUSED_TRANSPOSED:
            up, down = up[::-1], down[::-1]
        return {"gate_up_proj": (self.experts, *up), "down_proj": (self.experts, *down)}


def experts_below(root: str) -> str:
    """A pattern for the beginning of the names of all routed experts of layers below a root."""
    return rf"{re.escape(root)}layers\.\d+\.mlp\.experts\."


def find_expert_layout(
    tensors: Mapping[str, TensorLike],
    prefix: str,
    sizes: ExpertSizes,
    given: ExpertLayout | None = None,
) -> ExpertLayout | None:
    """The layout of the experts whose names start with the pattern `prefix`; None for no experts.

    given: what the user says it is. Raises InputError if the shapes contradict that, ConfigError
    for names of two layouts.
    """
    one = re.compile(prefix + r"\d+\.(gate|up|down)_proj\.weight")
    fused = re.compile(prefix + r"(gate_up_proj|down_proj)")
    names = [name for name in tensors if re.match(prefix, name)]
    if not names:
        return None
    per_expert = [name for name in names if one.fullmatch(name)]
    whole = {name: match[1] for name in names if (match := fused.fullmatch(name))}
    if per_expert and whole:
        raise ConfigError(
            f"{per_expert[0]} lies on its own, {next(iter(whole))} holds all experts; the experts "
            f"of one model should lie in one way"
        )
    if per_expert:
        return ExpertLayout.PER_EXPERT
    fits = {
        layout: sum(
            tuple(tensors[name].shape) == sizes.shapes(layout)[kind] for name, kind in whole.items()
        )
        for layout in (ExpertLayout.FUSED, ExpertLayout.FUSED_TRANSPOSED)
    }
    fitting = {layout for layout, count in fits.items() if count == len(whole)}
    if given is not None and fitting and given not in fitting:
        wanted = sizes.shapes(given)
        name = max(whole, key=lambda name: tuple(tensors[name].shape) != wanted[whole[name]])
        raise InputError(
            f"{name} of shape {tuple(tensors[name].shape)} lies "
            f"{' or '.join(sorted(fitting))}, not {given}; leave the layout of the experts to be "
            f"found from names and shapes"
        )
    if given in fitting:
        return given
    # One of the two matrices may be square; the other one is not, and decides. Shapes that do not
    # fit, and a matrix that is absent, are a matter of the plan, which says what does not.
    likeness = {
        layout: sum(
            size == other
            for name, kind in whole.items()
            for size, other in zip(tensors[name].shape, sizes.shapes(layout)[kind], strict=False)
        )
        for layout in fits
    }
    return max(fits, key=lambda layout: (fits[layout], likeness[layout]))
