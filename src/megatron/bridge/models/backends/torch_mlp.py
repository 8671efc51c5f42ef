"""Dense MLPs and experts in plain torch, with as few passes over the activations as it takes."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.models.backends.torch_linear import is_plain


class TorchMLP(MLP):
    """megatron-core's MLP without the constants that it adds and the casts that change nothing."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As MLP; [s, b, h] to [s, b, h] and the bias that is still to be added."""
        if per_token_scale is not None or not _is_plain_activation(self.config):
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, per_token_scale, **more
            )
            return output
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        result: tuple[Tensor, Tensor | None] = self.linear_fc2(_activated(inner, self.config))
        return result


class TorchExperts(SequentialMLP):
    """The experts of a rank: each multiplies its own tokens, all else is done to all at once."""

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """As SequentialMLP.

        Args:
            permuted_local_hidden_states: [tokens, h], those of the first expert first.
            tokens_per_expert: int64 [experts].
            permuted_probs: [tokens], by which the output is multiplied.
        """
        if not self._is_plain():
            output: tuple[Tensor, Tensor | None] = super().forward(
                permuted_local_hidden_states, tokens_per_expert, permuted_probs
            )
            return output
        counts = tokens_per_expert.tolist()
        inner = self._multiplied("linear_fc1", permuted_local_hidden_states, counts)
        inner = _activated(inner, self.config)
        inner = (inner * permuted_probs.unsqueeze(-1)).to(permuted_local_hidden_states.dtype)
        return self._multiplied("linear_fc2", inner, counts), None

    def _is_plain(self) -> bool:
        config = self.config
        return (
            _is_plain_activation(config)
            and not (config.add_bias_linear or config.moe_apply_probs_on_input)
            and not (config.fp8 or config.fp4)
            and all(
                map(is_plain, (self.local_experts[0].linear_fc1, self.local_experts[0].linear_fc2))
            )
        )

    def _multiplied(self, linear: str, inputs: Tensor, counts: list[int]) -> Tensor:
        """What each expert's linear makes of its part of the inputs."""
        linears = [getattr(expert, linear) for expert in self.local_experts]
        parts = list(zip(linears, inputs.split(counts), strict=True))
        if self.training or torch.is_grad_enabled():
            # In training an expert without tokens has work too: data parallelism waits for its
            # gradient, of zeros, and has its weight ready when it is called.
            return torch.cat([one(part)[0] for one, part in parts])
        parts = [(one, part) for one, part in parts if len(part)] or parts[:1]
        if not all(_is_a_product(one, inputs) for one in linears):
            return torch.cat([one(part)[0] for one, part in parts])
        # Straight to its place: to put the parts together costs another pass.
        output = inputs.new_empty(len(inputs), linears[0].weight.shape[0])
        places = output.split([len(part) for _, part in parts])
        for (one, part), place in zip(parts, places, strict=True):
            torch.mm(part, one.weight.t(), out=place)
        return output


def _is_a_product(linear: Any, inputs: Tensor) -> bool:
    """Whether calling a plain linear is a product and nothing else: nobody listens, or casts."""
    return not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear.weight.dtype != inputs.dtype
        or torch.is_autocast_enabled(inputs.device.type)
    )


def _is_plain_activation(config: TransformerConfig) -> bool:
    """Whether the activation is that of the config, and the gate nothing but multiplied with it."""
    return not (
        config.use_te_activation_func
        or config.bias_activation_fusion
        or config.activation_func_clamp_value is not None
        or config.glu_linear_offset
    )


def _activated(inner: Tensor, config: TransformerConfig) -> Tensor:
    if not config.gated_linear_unit:
        activated: Tensor = config.activation_func(inner)
        return activated
    gate, up = inner.chunk(2, dim=-1)
    activated = config.activation_func(gate)
    # Nothing else reads it, but for gradients: new memory costs as much as a pass.
    memory = None if torch.is_grad_enabled() else activated
    return torch.mul(activated, up, out=memory)
