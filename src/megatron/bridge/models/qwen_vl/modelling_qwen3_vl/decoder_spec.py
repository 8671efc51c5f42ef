"""Which layers the language model has on a pipeline stage: they need not be alike."""

from typing import TYPE_CHECKING

from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_moe_layer_pattern,
)
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from megatron.bridge.models.backends.layer_spec import layer_spec, multi_token_prediction_spec
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.deepstack import DeepstackTransformerLayer
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.following_token import (
    FollowingTokenPredictor,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.router_loss import CountedRouter

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider


def decoder_spec(
    config: "Qwen3VLModelProvider", vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The decoder layers of a pipeline stage and the final norm.

    `linear_attention_freq` and `moe_layer_freq` say which layer is of which kind; the specs of
    layers of the same kind are one object.
    """
    linear_attention = get_linear_attention_pattern(config)
    experts = [0] * config.num_layers
    if config.num_moe_experts is not None:
        experts = get_moe_layer_pattern(config)
    kinds = list(zip(linear_attention, experts, strict=True))
    of_kind = {
        kind: _layer(
            config,
            DeepstackTransformerLayer,
            linear_attention=bool(kind[0]),
            mixture_of_experts=bool(kind[1]),
            router=CountedRouter if config.has_router_loss else TopKRouter,
        )
        for kind in sorted(set(kinds))
    }
    return TransformerBlockSubmodules(
        layer_specs=[of_kind[kinds[layer]] for layer in _local_layers(config, vp_stage, pp_rank)],
        layer_norm=get_backend(config.transformer_impl).layer_norm(
            rms_norm=config.normalization == "RMSNorm"
        ),
    )


def predictor_spec(
    config: "Qwen3VLModelProvider",
) -> MultiTokenPredictionBlockSubmodules | None:
    """The block of multi-token prediction, None without `mtp_num_layers`.

    Its layer has full attention, and experts if the model has them.
    """
    if not config.mtp_num_layers:
        return None
    layer = _layer(
        config,
        TransformerLayer,
        linear_attention=False,
        mixture_of_experts=config.num_moe_experts is not None,
    )
    backend = get_backend(config.transformer_impl)
    return multi_token_prediction_spec(config, backend, layer, FollowingTokenPredictor)


def _layer(
    config: "Qwen3VLModelProvider",
    layer_class: type[TransformerLayer],
    *,
    linear_attention: bool,
    mixture_of_experts: bool,
    router: type[TopKRouter] = TopKRouter,
) -> ModuleSpec:
    return layer_spec(
        config,
        get_backend(config.transformer_impl),
        AttnMaskType.causal,
        layer_class=layer_class,
        attention_output_bias=config.add_attention_output_bias,
        linear_attention=linear_attention,
        mixture_of_experts=mixture_of_experts,
        rotary_scaling=config.rotary_frequencies.attention_scaling(),
        router=router,
    )


def _local_layers(config: "Qwen3VLModelProvider", vp_stage: int | None, pp_rank: int) -> list[int]:
    """Numbers, from 0, of the layers on a pipeline stage."""
    if (layout := config.pipeline_model_parallel_layout) is not None:
        return layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank)))
