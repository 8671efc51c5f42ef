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
        return (_rotated(query, cosine, sine), _rotated(key, cosine, sine), *rest)

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


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x * cosine + (-second half, first half of x) * sine, of the channels that have an angle."""
    half = cosine.shape[-1] // 2
    first, second, unturned = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    if torch.is_grad_enabled():
        turned = [
            first * cosine[..., :half] - second * sine[..., :half],
            second * cosine[..., half:] + first * sine[..., half:],
        ]
    else:  # the same bits in place, which saves putting the halves together
        whole = x[..., : 2 * half] * cosine
        other = second * sine[..., :half]
        whole[..., :half].sub_(other)
        whole[..., half:].add_(torch.mul(first, sine[..., half:], out=other))
        turned = [whole]
    parts = [*turned, unturned] if unturned.shape[-1] else turned
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
