"""Adapters of low rank (LoRA) that are merged into weights on the way, box by box."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from megatron.bridge.errors import InputError


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to a weight: ``scale * b @ a``.

    All are this rank's own parts: of a layer that is split by its outputs `b` is split as the
    weight is and `a` is whole, of one that is split by its inputs `a` is split and `b` is whole.

    Attributes:
        weight: [outputs, inputs], the parameter as the model has it.
        a: [rank, inputs].
        b: [outputs, rank].
        scale: alpha / rank.
    """

    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def check(self, name: str) -> None:
        """Refuse factors that do not fit the weight of this name. Raises InputError."""
        shapes = tuple(self.a.shape), tuple(self.b.shape)
        outputs, inputs = self.weight.shape if self.weight.dim() == 2 else (None, None)
        if not (
            [len(shape) for shape in shapes] == [2, 2]
            and (shapes[1][0], shapes[0][1]) == (outputs, inputs)
            and shapes[0][0] == shapes[1][1]
        ):
            raise InputError(
                f"{name}: its weight has shape {tuple(self.weight.shape)} on this rank, a has "
                f"{shapes[0]} and b {shapes[1]}; expected a [rank, inputs] and b [outputs, rank]"
            )

    def rows(self, start: int, stop: int) -> Self:
        """The same for some rows of the weight."""
        return replace(self, weight=self.weight[start:stop], b=self.b[start:stop])

    def copy(self) -> Self:
        """The same factors in memory of their own."""
        return replace(self, a=self.a.detach().clone(), b=self.b.detach().clone())

    def added_to(self, values: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Values of some rows and columns of the weight with the product added, in float64.

        In that, what comes out is the same to the last bit of any weight's dtype, however a tensor
        is cut into boxes, and no device takes a shorter way.
        """
        b, a = self.b.detach()[rows].double(), self.a.detach()[:, columns].double()
        return values.double() + (b @ a).mul_(self.scale).view(values.shape)
