"""Normalization layers in plain torch, with the roundings of Hugging Face's models."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.errors import ConfigError


class RMSNorm(nn.Module):
    """x / rms(x), scaled by `weight`; computed in fp32 whatever the dtype of `x`.

    Plain: `weight * normalized.to(x.dtype)`, as transformers rounds it. Zero-centred
    (`config.layernorm_zero_centered_gamma`): `(normalized * (1 + weight)).to(x.dtype)`, the
    product in fp32, as transformers rounds that.

    Args:
        config: for `params_dtype`, `sequence_parallel`, `layernorm_zero_centered_gamma`.
        hidden_size: size of the last dimension of the input.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        _mark_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x` of shape [..., hidden_size]."""
        x_fp32 = x.float()
        squares = x_fp32.square()
        scale = torch.rsqrt(squares.mean(-1, keepdim=True) + self.eps)
        # The squares are needed no more, but for gradients: new memory costs as much as a pass.
        memory = None if torch.is_grad_enabled() else squares
        normalized = torch.mul(x_fp32, scale, out=memory)
        if self.zero_centered:
            return torch.mul(normalized, 1.0 + self.weight.float(), out=memory).to(x.dtype)
        return self.weight * normalized.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and constants, for printing."""
        return f"{self.weight.numel()}, eps={self.eps}, zero_centered={self.zero_centered}"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, built and marked the way megatron-core expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """The norm of `config.normalization`; a megatron-core LayerNormBuilder."""
    if config.normalization == "RMSNorm":
        return RMSNorm(config, hidden_size, eps)
    if config.normalization == "LayerNorm":
        if config.layernorm_zero_centered_gamma:
            raise ConfigError(
                "layernorm_zero_centered_gamma=True needs normalization='RMSNorm', found "
                "'LayerNorm'. Set one of the two."
            )
        return LayerNorm(config, hidden_size, eps)
    raise ConfigError(f"normalization={config.normalization!r} is not 'RMSNorm' or 'LayerNorm'")


def _mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Tell megatron-core to sum these gradients over the tensor-parallel ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
