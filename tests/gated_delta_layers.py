"""Small Gated DeltaNet layers, no size like another."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.models.backends.gated_delta_net import gated_delta_net_spec
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.runtime.cpu import megatron_on_cpu

KEY_HEADS, KEY_SIZE, VALUE_SIZE, HIDDEN, KERNEL = 2, 6, 10, 44, 4


def config(repeats: int = 3, **fields: Any) -> TransformerConfig:
    """`repeats` value heads for every key head."""
    defaults = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": True,
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": 4,
        "linear_conv_kernel_dim": KERNEL,
        "linear_key_head_dim": KEY_SIZE,
        "linear_value_head_dim": VALUE_SIZE,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": KEY_HEADS * repeats,
    }
    return TransformerConfig(**defaults | fields)


def build(layer_config: TransformerConfig, ssm_dtype: torch.dtype | None = None) -> Any:
    """The module as a transformer layer builds it."""
    with megatron_on_cpu():
        return build_module(
            gated_delta_net_spec(layer_config, get_backend("local"), ssm_dtype),
            config=layer_config,
            layer_number=1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            name="decoder.layers.0.self_attention",
        )


def random_layer(layer_config: TransformerConfig) -> Any:
    """A layer that remembers some tokens long, and forgets others at once."""
    torch.manual_seed(7)
    layer = build(layer_config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                parameter.copy_(noise * (1.0 if name == "A_log" else 0.4))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return layer


def run(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[b, s, h] in and out."""
    with megatron_on_cpu():
        output, bias = layer(hidden_states.transpose(0, 1), *(args or (None,)), **kwargs)
    assert bias is None
    return output.transpose(0, 1)


def gradients(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator(output.device).manual_seed(3)
    with megatron_on_cpu():
        found = torch.autograd.grad(
            output,
            list(inputs.values()),
            torch.randn(output.shape, generator=generator, device=output.device),
        )
    return dict(zip(inputs, found, strict=True))
