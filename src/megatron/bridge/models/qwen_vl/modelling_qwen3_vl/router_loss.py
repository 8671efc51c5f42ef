"""The loss that balances the experts, as transformers has it: over the routers of all layers.

    experts * sum over the experts of (share of the tokens it gets) * (mean of its probability)

Both means go over the tokens of all layers together, which the loss of megatron-core, one layer at
a time, does not. Every router counts when it routes, and what all have counted is there when the
gradient comes back to it: d loss / d probability = experts * tokens of the expert / all tokens^2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron.bridge.errors import InputError


class RouterCounts:
    """What the routers of one forward pass count.

    Args:
        weight: weight of the loss: the coefficient, times the number of tokens where gradients are
            divided by that later (`calculate_per_token_loss`).
    """

    def __init__(self, weight: Tensor | float) -> None:
        self.weight = weight
        self.layers: list[Tensor] = []
        self.total: Tensor | None = None

    def count(self, chosen: Tensor, tokens: Tensor) -> None:
        """Add what one router counted.

        A layer that is recomputed counts the same again, which is not added.

        Args:
            chosen: fp32 [experts], how many tokens chose each expert, without padding.
            tokens: fp32 [], how many tokens there are, without padding.
        """
        if self.total is None:
            self.layers.append(torch.cat((chosen, tokens.view(1))))

    def close(self, sequence_parts: Sequence[dist.ProcessGroup]) -> None:
        """Sum up: all routers have counted.

        Args:
            sequence_parts: groups of ranks that have counted a part of the sequence each.
        """
        total = torch.stack(self.layers).sum(0)
        for group in sequence_parts:
            dist.all_reduce(total, group=group)
        self.total = total

    def loss_by_probability(self) -> Tensor:
        """fp32 [experts], d loss / d probability, the same for all tokens of all layers.

        Raises:
            InputError: the counting has not been closed.
        """
        if self.total is None:
            raise InputError("the gradient of the routers' loss was asked for during the forward")
        chosen, tokens = self.total[:-1], self.total[-1]
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        weight = self.weight if scale is None else self.weight * scale
        return weight * chosen.numel() * chosen / tokens**2


class RouterLoss:
    """Which counts the routers of a model write to at the moment: None where there is no loss."""

    def __init__(self) -> None:
        self.counts: RouterCounts | None = None

    def attach(self, output: Tensor, counts: RouterCounts | None) -> Tensor:
        """The output of a forward pass, whose gradient brings that of the routers along.

        Recomputed layers route anew during the backward pass, which begins here: they find the
        counts of their own forward pass again, or none, whatever ran in between.
        """
        attached: Tensor = _BeginBackward.apply(output, self, counts)
        return attached


class CountedRouter(TopKRouter):
    """A router that takes part in the loss of all routers.

    Attributes:
        router_loss: the loss of the model, which the model sets.
    """

    router_loss: RouterLoss

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route as TopKRouter does, and count.

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
                counts.count(chosen.sum((0, 1)), real.sum())
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
    def forward(
        ctx: Any, output: Tensor, router_loss: RouterLoss, counts: RouterCounts | None
    ) -> Tensor:
        ctx.router_loss, ctx.counts = router_loss, counts
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.router_loss.counts = ctx.counts
        return gradient, None, None
