"""Which Gated DeltaNet a layer is built with, and its spec."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.gated_delta_net import HAVE_FLA, GatedDeltaNetSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def gated_delta_net_module(config: TransformerConfig) -> type:
    """megatron-core's on flash-linear-attention where that can run, plain torch elsewhere.

    In `deterministic_mode` megatron-core's class refuses packed sequences, and it knows no other
    activation than SiLU: it is plain torch then.
    """
    by_kernels = not config.deterministic_mode and config.activation_func is F.silu
    if HAVE_FLA and torch.cuda.is_available() and by_kernels:
        from megatron.bridge.models.backends.fla_gated_delta_net import FlaGatedDeltaNet

        return FlaGatedDeltaNet
    from megatron.bridge.models.backends.torch_gated_delta_net import TorchGatedDeltaNet

    return TorchGatedDeltaNet


def gated_delta_net_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    ssm_dtype: torch.dtype | None = None,
) -> ModuleSpec:
    """The `self_attention` of a linear attention layer.

    Where the backend fuses norms into linears, in_proj norms its input and `input_layernorm` of the
    layer is an IdentityOp.

    Args:
        config: of the layer.
        backend: supplies linears and norm.
        ssm_dtype: of A_log and out_norm; None for `params_dtype`.
    """
    in_proj = (
        backend.column_parallel_layer_norm_linear()
        if backend.fuse_layernorm_and_linear()
        else backend.column_parallel_linear()
    )
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    return ModuleSpec(
        module=gated_delta_net_module(config),
        params={"ssm_dtype": ssm_dtype},
        submodules=GatedDeltaNetSubmodules(
            in_proj=in_proj,
            out_norm=ModuleSpec(module=_Norm, params={"build": norm}),
            out_proj=backend.row_parallel_linear(),
        ),
    )


class _Norm:
    """What `build` makes. megatron-core's build_module does not call functions, only classes."""

    def __new__(cls, build: LayerNormBuilder, **arguments: Any) -> nn.Module:  # type: ignore[misc]
        return build(**arguments)
