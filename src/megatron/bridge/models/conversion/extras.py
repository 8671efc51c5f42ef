"""Tensors of Hugging Face files that no row maps: which of them are carried, and on what condition.

A model is in the files when every tensor that its rows need is there and fits. Whatever lies beside
it is carried by name: transformers does not read it either, and an export takes it from its
reference, so that files come back as they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron.bridge.models.conversion.plan import CopyOf
from megatron.bridge.tensors.boxes import Shape


def _beside(_name: str) -> str:
    return "it lies beside the model: no row needs it"


@dataclass(frozen=True)
class Extras:
    """What a family knows of the tensors that its rows do not name.

    Attributes:
        carried: those that are carried for a reason known beforehand.
        absent: those of them that belong to a part which the Megatron model was built without.
        equal: those that must equal another tensor.
        copies: those that must equal another tensor if a row needs that one, and mean nothing if
            not.
        needed: those that must be there, with their shapes, although no row maps them, and for
            what.
        reason: why any other is carried.
    """

    carried: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    equal: Mapping[str, CopyOf] = field(default_factory=dict)
    copies: Mapping[str, CopyOf] = field(default_factory=dict)
    needed: Mapping[str, tuple[Shape, str]] = field(default_factory=dict)
    reason: Callable[[str], str] = _beside
