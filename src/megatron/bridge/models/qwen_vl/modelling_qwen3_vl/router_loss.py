"""The loss that balances the experts, as transformers has it: over the routers of all layers.

    experts * sum over the experts of (share of the tokens it gets) * (mean of its probability)

Both means go over the tokens of all layers together, which the loss of megatron-core, one layer at
a time, does not. Every router counts when it routes, and what all have counted is there when the
gradient comes back to it: d loss / d probability = experts * tokens of the expert / all tokens^2.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


@dataclass
class RouterCounts:
    """What the routers of one forward pass counted.

    Attributes:
        weight: of the loss, the coefficient times the number of tokens where gradients are divided
            by that later (`calculate_per_token_loss`).
        chosen: by layer number, fp32 [experts], how many tokens chose each expert.
        tokens: by layer number, fp32 [], how many there are, without padding.
    """

    weight: Tensor | float
    chosen: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def count(self, layer: int, chosen: Tensor, tokens: Tensor) -> None:
        """Take what a router counted; a recomputed layer counts the same again."""
        self.chosen[layer], self.tokens[layer] = chosen, tokens

    def loss_by_probability(self) -> Tensor:
        """fp32 [experts], d loss / d probability, the same for all tokens of all layers."""
        chosen = torch.stack(list(self.chosen.values())).sum(0)
        tokens = torch.stack(list(self.tokens.values())).sum()
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        weight = self.weight if scale is None else self.weight * scale
        return weight * chosen.numel() * chosen / tokens**2


class RouterLoss:
    """Which counts the routers of a model write to at the moment: None where there is no loss."""

    def __init__(self) -> None:
        self.counts: RouterCounts | None = None

    def attach(self, loss: Tensor, counts: RouterCounts) -> Tensor:
        """The loss of the tokens, whose gradient brings that of the routers along.

        Recomputed layers route anew during the backward pass, which begins here: they find the
        counts of their own forward pass again, whatever ran in between.
        """
        attached: Tensor = _BeginBackward.apply(loss, self, counts)
        return attached


class CountedRouter(TopKRouter):
    """A router that takes part in the loss of all routers.

    Attributes:
        router_loss: that of the model, which the model sets.
    """

    router_loss: RouterLoss

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As TopKRouter.

        Args:
            logits: [s, b, experts].
            padding_mask: bool [s, b], True for padding; None if there is none.
        """
        if (counts := self.router_loss.counts) is not None:
            probabilities = logits.float().softmax(-1)
            with torch.no_grad():
                real = torch.ones_like(probabilities[..., :1])
                if padding_mask is not None:
                    real = real.masked_fill(padding_mask.unsqueeze(-1), 0.0)
                best = probabilities.topk(self.topk, dim=-1).indices
                chosen = torch.zeros_like(probabilities).scatter(-1, best, 1.0) * real
                counts.count(self.layer_number, chosen.sum((0, 1)), real.sum())
            if torch.is_grad_enabled():
                logits = _AddGradient.apply(logits, probabilities, real, counts)
        routed: tuple[Tensor, Tensor] = super().routing(logits, padding_mask=padding_mask)
        return routed


class _AddGradient(torch.autograd.Function):
    """Passes the logits on, and on the way back adds the gradient of the loss of all routers."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, probabilities: Tensor, real: Tensor, counts: RouterCounts
    ) -> Tensor:
        ctx.save_for_backward(real)
        ctx.counts, ctx.dtype = counts, probabilities.dtype
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (real,) = ctx.saved_tensors
        of_probabilities = real * ctx.counts.loss_by_probability()
        return gradient, of_probabilities.to(ctx.dtype), None, None


class _BeginBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, router_loss: RouterLoss, counts: RouterCounts) -> Tensor:
        ctx.router_loss, ctx.counts = router_loss, counts
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.router_loss.counts = ctx.counts
        return gradient, None, None
