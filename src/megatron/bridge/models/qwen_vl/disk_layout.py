"""How routed experts lie in files: found from names and shapes, never guessed."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.conversion.expert_layout import ExpertLayout, parse_expert_layout
from megatron.bridge.tensors.spec import TensorSpec

__all__ = [
    "DiskLayout",
    "ExpertLayout",
    "ExpertSizes",
    "check_expert_order",
    "find_expert_layout",
    "parse_expert_layout",
]

_FUSED = ("gate_up_proj", "down_proj")
_PARTS = ("gate", "up", "down")
_ONE = re.compile(rf"([0-9]{{1,9}})\.({'|'.join(_PARTS)})_proj\.weight")


@dataclass(frozen=True)
class DiskLayout:
    """How the experts of decoder and MTP layer lie in files; None where there are none."""

    decoder: ExpertLayout | None = None
    mtp: ExpertLayout | None = None


@dataclass(frozen=True)
class ExpertSizes:
    """What shapes are told apart by: experts, hidden size, intermediate size of one expert."""

    experts: int
    hidden: int
    intermediate: int

    def shapes(self, layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
        """Shapes of the two fused tensors, by the last part of their names."""
        up, down = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        if layout is ExpertLayout.FUSED_TRANSPOSED:
            up, down = up[::-1], down[::-1]
        return {"gate_up_proj": (self.experts, *up), "down_proj": (self.experts, *down)}


def find_expert_layout(
    tensors: Mapping[str, TensorSpec],
    root: str,
    sizes: ExpertSizes,
    layers: Collection[int],
    given: ExpertLayout | None = None,
    *,
    merged: bool = True,
) -> ExpertLayout | None:
    """The layout of the experts of the layers below a root; None for no experts.

    Args:
        tensors: those in the files, by name.
        root: what stands before ``layers.`` in their names.
        sizes: what the layouts are told apart by.
        layers: numbers of the layers that have experts; tensors of other layers mean nothing.
        given: the layout that the user states; None if the user states none.
        merged: whether transformers merges experts of this model that lie one by one; otherwise it
            passes over them.

    Raises:
        InputError: the shapes contradict `given`.
        ConfigError: there are names of two layouts, which transformers does not read as one.
    """
    below = re.compile(rf"{re.escape(root)}layers\.([0-9]{{1,9}})\.mlp\.experts\.(.*)", re.DOTALL)
    ends = {
        name: match[2]
        for name in tensors
        if (match := below.match(name)) and int(match[1]) in layers
    }
    if not ends:
        return None
    single = [name for name, end in ends.items() if _ONE.fullmatch(end)]
    whole = {name: end for name, end in ends.items() if end in _FUSED}
    if single and whole:
        fused_is_whole = len(whole) == len(_FUSED) * len(layers)
        single_is_whole = len(single) == len(_PARTS) * sizes.experts * len(layers)
        if single_is_whole and merged and "down_proj" not in whole.values():
            whole = {}  # merged experts come before a gate_up_proj of the same layer
        elif fused_is_whole and not merged:
            single = []
        else:
            what = next(iter(whole)) if single_is_whole else single[0]
            raise ConfigError(
                f"{single[0]} lies on its own, {next(iter(whole))} holds all experts; the experts "
                f"of one model should lie in one way: "
                + (
                    f"remove what is too much, such as {what}"
                    if fused_is_whole or single_is_whole
                    else "convert them to one"
                )
            )
    if single:
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


def check_expert_order(
    tensors: Collection[str], root: str, regular: Callable[[str], str], doubled: Collection[str]
) -> None:
    """Refuse experts that lie one by one, and that transformers would put in another order.

    It stacks those of a layer sorted by their names, so that under two roots they are mixed up.

    Args:
        tensors: names in the files.
        root: what stands before ``layers.`` in regular names.
        regular: gives a name as it would be under `root`.
        doubled: names of tensors that are also there under another root: each of them would be
            taken for one expert more.

    Raises:
        ConfigError: the experts of one layer would be mixed up.
    """
    name_of_one = re.compile(rf"({re.escape(root)}layers\.\d+\.mlp\.experts\.){_ONE.pattern}")
    stacked: dict[tuple[str, str], list[tuple[list[str], int, str]]] = defaultdict(list)
    for name in tensors:
        if match := name_of_one.fullmatch(regular(name)):
            module, expert, part = match.groups()
            roots = name[: name.rindex(".experts.")].split(".")
            stacked[module, part].append((roots, int(expert), name))
    for experts in stacked.values():
        experts.sort()
        numbers = [expert for _, expert, _ in experts]
        if numbers != sorted(numbers) or any(name in doubled for *_, name in experts):
            raise ConfigError(
                f"the experts of one layer stand under two prefixes, {experts[0][-1]} among them: "
                f"transformers, which stacks them sorted by name, would mix them up; give all of "
                f"them the same prefix"
            )
