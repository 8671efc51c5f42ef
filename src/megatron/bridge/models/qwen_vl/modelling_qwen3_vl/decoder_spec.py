"""Which layers the language model has on a pipeline stage: they need not be alike."""

from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, signature
from typing import TYPE_CHECKING

from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_moe_layer_pattern,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.backends.layer_spec import layer_spec, multi_token_prediction_spec
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.pipeline_stages import pipeline_stages, stage_index
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.deepstack import DeepstackTransformerLayer
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.following_token import (
    FollowingTokenPredictor,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.router_loss import CountedRouter

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider


type DecoderSpec = ModuleSpec | TransformerBlockSubmodules


def decoder_spec(
    config: "QwenModelProvider", vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder layers of a pipeline stage and the final norm.

    `linear_attention_freq` and `moe_layer_freq` say which layer is of which kind; the specs of
    layers of the same kind are one object.

    Args:
        config: the provider.
        vp_stage: virtual pipeline stage; None without interleaving.
        pp_rank: pipeline rank; None for that of this process.
    """
    if pp_rank is None:
        pp_rank = ProcessGroupCollection.use_mpu_process_groups(["pp"]).pp.rank()
    linear_attention = get_linear_attention_pattern(config)
    experts = [0] * config.num_layers
    if config.num_moe_experts is not None:
        experts = get_moe_layer_pattern(config)
    kinds = list(zip(linear_attention, experts, strict=True))
    of_kind = {
        kind: _layer(
            config,
            DeepstackTransformerLayer if config.takes_deepstack else TransformerLayer,
            linear_attention=bool(kind[0]),
            mixture_of_experts=bool(kind[1]),
            router=CountedRouter if config.has_router_loss else TopKRouter,
        )
        for kind in sorted(set(kinds))
    }
    layers = _local_layers(config, vp_stage, pp_rank)
    return _block(config, [of_kind[kinds[layer]] for layer in layers])


def stage_spec(
    config: "QwenModelProvider", vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The decoder layers of a pipeline stage by the provider's `transformer_layer_spec`.

    Args:
        config: the provider.
        vp_stage: virtual pipeline stage; None without interleaving.
        pp_rank: pipeline rank.

    Raises:
        ConfigError: it gives no layers, another number of them than the stage has, or layers that
            would leave out the features of deepstack.
    """
    given = config.transformer_layer_spec
    if given is decoder_spec:
        return decoder_spec(config, vp_stage, pp_rank)
    if not isinstance(given, (ModuleSpec, TransformerBlockSubmodules)):
        given = _called(given, config, vp_stage)
    count = len(_local_layers(config, vp_stage, pp_rank))
    if isinstance(given, ModuleSpec):
        given = _block(config, [given] * count)
    if len(given.layer_specs) != count:
        raise ConfigError(
            f"transformer_layer_spec gives {len(given.layer_specs)} layers, expected the {count} "
            f"of this pipeline stage"
        )
    if not config.takes_deepstack:
        return given
    return replace(given, layer_specs=[_with_deepstack(layer) for layer in given.layer_specs])


def _called(
    given: Callable[..., DecoderSpec], config: "QwenModelProvider", vp_stage: int | None
) -> DecoderSpec:
    """What the callable gives, which takes the config, and `vp_stage` if it has a place for it."""
    expected = (
        "a ModuleSpec of a layer, TransformerBlockSubmodules, or a callable that takes the "
        "provider (and vp_stage) and returns one of them"
    )
    if not callable(given):
        raise ConfigError(f"transformer_layer_spec is {given!r}; expected {expected}")
    parameters = signature(given).parameters
    takes_stage = "vp_stage" in parameters or any(
        one.kind is Parameter.VAR_KEYWORD for one in parameters.values()
    )
    found = given(config, vp_stage=vp_stage) if takes_stage else given(config)
    if not isinstance(found, (ModuleSpec, TransformerBlockSubmodules)):
        raise ConfigError(f"transformer_layer_spec returns {found!r}; expected {expected}")
    return found


def _with_deepstack(layer: ModuleSpec) -> ModuleSpec:
    """A layer that adds the features of deepstack to what this one gives."""
    if layer.module is TransformerLayer:
        return replace(layer, module=DeepstackTransformerLayer)
    if isinstance(layer.module, type) and issubclass(layer.module, DeepstackTransformerLayer):
        return layer
    name = getattr(layer.module, "__name__", layer.module)
    raise ConfigError(
        f"transformer_layer_spec gives layers of class {name}, which would leave out the deepstack "
        f"features of pictures: give TransformerLayer or a subclass of DeepstackTransformerLayer"
    )


def _block(
    config: "QwenModelProvider", layer_specs: list[ModuleSpec]
) -> TransformerBlockSubmodules:
    """These layers, and the final norm of the backend."""
    return TransformerBlockSubmodules(
        layer_specs=layer_specs,
        layer_norm=get_backend(config.transformer_impl).layer_norm(
            rms_norm=config.normalization == "RMSNorm"
        ),
    )


def predictor_spec(
    config: "QwenModelProvider",
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
    config: "QwenModelProvider",
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


def _local_layers(config: "QwenModelProvider", vp_stage: int | None, pp_rank: int) -> range:
    """Numbers, from 0, of the layers on a pipeline stage."""
    return pipeline_stages(config)[stage_index(config, vp_stage, pp_rank)].layers
