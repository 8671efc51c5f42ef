"""Specs of transformer layers for any backend, and of what they are put together from."""

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron.bridge.models.backends.gated_delta_net import gated_delta_net_spec
from megatron.bridge.models.backends.scaled_rotary import ScaledRotarySelfAttention
from megatron.bridge.models.backends.torch_backend import TorchSpecProvider
from megatron.bridge.models.backends.torch_mlp import TorchMLP
from megatron.bridge.models.backends.torch_self_attention import TorchSelfAttention

# Checkpoints carry the names of a backend that fuses norms and linears, so that one written by a
# backend loads in another. No backend fuses the norm in front of a mixture of experts.
_ATTENTION_NORM_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_GATED_DELTA_NET_NORM_KEYS = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
_DENSE_MLP_NORM_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def layer_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    attn_mask_type: AttnMaskType,
    *,
    layer_class: type[TransformerLayer] = TransformerLayer,
    attention_output_bias: bool | None = None,
    linear_attention: bool = False,
    mixture_of_experts: bool = False,
    rotary_scaling: float = 1.0,
    router: type[TopKRouter] = TopKRouter,
) -> ModuleSpec:
    """Pre-norm token mixer and MLP, the norms fused into the linears if the backend does so.

    Args:
        config: of the layer; `qk_layernorm` and `normalization` decide about the norms.
        backend: supplies the modules.
        attn_mask_type: causal for the language model, no_mask for the vision encoder.
        layer_class: the module of the layer.
        attention_output_bias: whether linear_proj has a bias; None follows `add_bias_linear`.
        linear_attention: mix tokens by gated delta rule instead of attention.
        mixture_of_experts: router, experts and, if the config has one, shared expert instead of a
            dense MLP.
        rotary_scaling: what cos and sin of the rotary embedding are multiplied by.
        router: chooses the experts.
    """
    rms_norm = config.normalization == "RMSNorm"
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=rms_norm)
    keys = (_GATED_DELTA_NET_NORM_KEYS if linear_attention else _ATTENTION_NORM_KEYS) | (
        {} if mixture_of_experts else _DENSE_MLP_NORM_KEYS
    )
    return ModuleSpec(
        module=layer_class,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=gated_delta_net_spec(config, backend, config.ssm_dtype)
            if linear_attention
            else _attention(config, backend, attn_mask_type, attention_output_bias, rotary_scaling),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused and not mixture_of_experts else norm,
            mlp=_experts(config, backend, router) if mixture_of_experts else _dense_mlp(backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else keys,
        ),
    )


def multi_token_prediction_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    layer: ModuleSpec,
    predictor_class: type[MultiTokenPredictionLayer] = MultiTokenPredictionLayer,
) -> MultiTokenPredictionBlockSubmodules:
    """`mtp_num_layers` predictors of one more token each, around the decoder layer `layer`."""
    predictor = get_mtp_layer_spec_for_backend(layer, backend)
    predictor.module = predictor_class
    built = 1 if config.mtp_use_repeated_layer else config.mtp_num_layers
    return MultiTokenPredictionBlockSubmodules(layer_specs=[predictor] * built)


def _attention(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    attn_mask_type: AttnMaskType,
    output_bias: bool | None,
    rotary_scaling: float,
) -> ModuleSpec:
    rms_norm = config.normalization == "RMSNorm"
    qk_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if config.qk_layernorm else None
    linear_proj: Any = backend.row_parallel_linear()
    if output_bias is not None:
        linear_proj = partial(_build_with_bias, linear_proj, output_bias)
    in_torch = isinstance(backend, TorchSpecProvider)
    return ModuleSpec(
        module=TorchSelfAttention if in_torch else ScaledRotarySelfAttention,
        params={"attn_mask_type": attn_mask_type, "rotary_scaling": rotary_scaling},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_linear_after_norm(backend),
            core_attention=backend.core_attention(),
            linear_proj=linear_proj,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _dense_mlp(backend: BackendSpecProvider) -> Any:
    spec: Any = get_mlp_module_spec_for_backend(backend)
    if isinstance(backend, TorchSpecProvider):
        return partial(TorchMLP.as_mlp_submodule, **spec.keywords)
    return spec


def _experts(
    config: TransformerConfig, backend: BackendSpecProvider, router: type[TopKRouter]
) -> Any:
    layer: Any = get_moe_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    return partial(layer, submodules=replace(layer.keywords["submodules"], router=router))


def _linear_after_norm(backend: BackendSpecProvider) -> Any:
    """The linear that takes what a norm gives, with the norm inside if the backend fuses them."""
    if backend.fuse_layernorm_and_linear():
        return backend.column_parallel_layer_norm_linear()
    return backend.column_parallel_linear()


def _build_with_bias(linear: type, has_bias: bool, *args: Any, **kwargs: Any) -> Any:
    """megatron-core's attention has no config field for the bias of its output projection."""
    return linear(*args, **{**kwargs, "bias": has_bias})
