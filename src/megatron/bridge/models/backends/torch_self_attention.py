"""Attention that rotates queries and keys itself, in plain torch.

megatron-core takes cosine and sine of all angles again in each layer, once for the queries and once
for the keys, and copies what it has rotated.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.bridge.models.backends.scaled_rotary import ScaledRotarySelfAttention

_KEPT = "cosine_and_sine"


class TorchSelfAttention(ScaledRotarySelfAttention):
    """SelfAttention for training and for forward passes without a cache."""

    _angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's SelfAttention."""
        own = rotary_pos_emb is not None and self._can_rotate(hidden_states, rotary_pos_emb, more)
        self._angles = rotary_pos_emb if own else None
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=None if own else rotary_pos_emb,
                **more,
            )
        finally:
            self._angles = None
        return output

    def get_query_key_value_tensors(self, *args: Any, **more: Any) -> Any:
        """As megatron-core's, rotated."""
        made = super().get_query_key_value_tensors(*args, **more)
        if self._angles is None:
            return made
        query, key, *rest = made
        cosine, sine = _cosine_and_sine(self._angles, self.rotary_scaling, query.dtype)
        query, key = (_Rotation.apply(x, cosine, sine) for x in (query, key))
        return query, key, *rest

    def _can_rotate(self, hidden_states: Tensor, angles: Any, more: dict[str, Any]) -> bool:
        """Whether there is an angle for each token, and none of megatron-core's own ways asked."""
        config = self.config
        parts = self.pg_collection.tp.size() if config.sequence_parallel else 1
        return (
            isinstance(angles, Tensor)
            and len(angles) == len(hidden_states) * parts
            and more.get("inference_context") is None
            and more.get("inference_params") is None
            and not (config.rotary_interleaved or config.no_rope_freq or config.apply_rope_fusion)
            and not config.fused_single_qkv_rope
        )


def _cosine_and_sine(angles: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of angles that all layers share: they are kept with these."""
    kept: dict[Any, tuple[Tensor, Tensor]] = vars(angles).setdefault(_KEPT, {})
    if (scaling, dtype) not in kept:
        both = angles.cos(), angles.sin()
        if scaling != 1.0:
            both = both[0] * scaling, both[1] * scaling
        kept[scaling, dtype] = both[0].to(dtype), both[1].to(dtype)
    return kept[scaling, dtype]


class _Rotation(torch.autograd.Function):
    """x * cosine + (-second half, first half of x) * sine, of the channels that have an angle.

    The gradient is rotated back. Autograd alone keeps and makes a tensor for each of the products,
    which costs a pass over the activations each; with and without gradients the bits are the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """[s, b, heads, d] by [s, b, 1, angles] in its dtype, of which d may be longer."""
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """That of `forward`, by x."""
        cosine, sine = ctx.saved_tensors
        back = sine.roll(sine.shape[-1] // 2, dims=-1).neg_()
        return _rotated(gradients[0], cosine, back), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    angles = cosine.shape[-1]
    half = angles // 2
    first, second, unturned = x.split([half, half, x.shape[-1] - angles], dim=-1)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned = rotated[..., :angles]
    torch.mul(x[..., :angles], cosine, out=turned)
    other = second * sine[..., :half]
    turned[..., :half].sub_(other)
    turned[..., half:].add_(torch.mul(first, sine[..., half:], out=other))
    if unturned.shape[-1]:
        rotated[..., angles:] = unturned
    return rotated
