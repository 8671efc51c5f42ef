"""The spec of a dense transformer layer, for any backend."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

# Checkpoints carry the fused names, so that one written by a backend loads in another.
FUSED_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def dense_layer_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    attn_mask_type: AttnMaskType,
    *,
    layer_class: type[TransformerLayer] = TransformerLayer,
    attention_output_bias: bool | None = None,
) -> ModuleSpec:
    """Pre-norm self attention and MLP, the norms fused into the linears if the backend does so.

    Args:
        config: of the layer; `qk_layernorm` and `normalization` decide about the norms.
        backend: supplies the modules.
        attn_mask_type: causal for the language model, no_mask for the vision encoder.
        layer_class: the module of the layer.
        attention_output_bias: whether linear_proj has a bias; None follows `add_bias_linear`.
    """
    rms_norm = config.normalization == "RMSNorm"
    fused = backend.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=rms_norm)
    qk_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if config.qk_layernorm else None
    linear_qkv = (
        backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    )
    linear_proj: Any = backend.row_parallel_linear()
    if attention_output_bias is not None:
        linear_proj = partial(_build_with_bias, linear_proj, attention_output_bias)
    return ModuleSpec(
        module=layer_class,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv,
                    core_attention=backend.core_attention(),
                    linear_proj=linear_proj,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else FUSED_NORM_KEYS,
        ),
    )


def _build_with_bias(linear: type, has_bias: bool, *args: Any, **kwargs: Any) -> Any:
    """megatron-core's attention has no config field for the bias of its output projection."""
    return linear(*args, **{**kwargs, "bias": has_bias})
