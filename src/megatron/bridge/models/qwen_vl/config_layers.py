"""What a config says of a model's layers: read once, for its structure and for its provider."""

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import HYBRID_TYPES, MOE_TYPES, is_read
from megatron.bridge.models.qwen_vl.disk_layout import ExpertSizes
from megatron.bridge.models.qwen_vl.parts import (
    DENSE_MLP,
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    SPARSE_MLP,
)
from megatron.bridge.text.quoting import quoted

MAX_PARTS = 1 << 18
"""Heads or experts of all layers together: more than any model has. A plan goes through all."""


def is_tied(config: HFConfig) -> bool:
    """Whether the output layer is the embedding."""
    return config.require("tie_word_embeddings", bool)


def has_experts(text: HFConfig) -> bool:
    """Whether a text config describes a mixture of experts."""
    return text.root.model_type in MOE_TYPES


def has_delta_net(text: HFConfig) -> bool:
    """Whether a text config describes Gated DeltaNet layers."""
    return text.root.model_type in HYBRID_TYPES


def expert_sizes(text: HFConfig) -> ExpertSizes:
    """What tells the disk layouts of experts apart."""
    return ExpertSizes(
        expert_count(text), text.count("hidden_size"), text.count("moe_intermediate_size")
    )


def decoder_layers(text: HFConfig) -> tuple[int, ...]:
    """The numbers of the text model's layers."""
    parts = [text.count("num_key_value_heads", MAX_PARTS)]
    if has_experts(text):
        parts.append(expert_count(text))
    if has_delta_net(text):
        parts.append(text.count("linear_num_key_heads", MAX_PARTS))
    return tuple(range(text.count("num_hidden_layers", MAX_PARTS // max(parts))))


def attention_kinds(text: HFConfig, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Which layers have full attention and which Gated DeltaNet, from `layer_types`.

    Raises:
        ConfigError: `layer_types` does not name one of these two for each layer.
    """
    if not has_delta_net(text):
        return {FULL_ATTENTION: layers, LINEAR_ATTENTION: ()}
    types = text.list_of("layer_types", str)
    unknown = set(types) - {FULL_ATTENTION, LINEAR_ATTENTION}
    if len(types) != len(layers) or unknown:
        raise ConfigError(
            f"{text.origin}: {text.dotted('layer_types')} should name {len(layers)} layers, each "
            f"{FULL_ATTENTION} or {LINEAR_ATTENTION}; found {len(types)}, "
            f"{quoted(sorted(set(types)))}"
        )
    return {
        kind: tuple(layer for layer in layers if types[layer] == kind)
        for kind in (FULL_ATTENTION, LINEAR_ATTENTION)
    }


def mlp_kinds(text: HFConfig, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Which layers have one MLP and which routed experts.

    Layers in `mlp_only_layers`, and all but every `decoder_sparse_step`-th, have one MLP. Numbers
    of layers that the model does not have mean nothing, as after the last layers were cut off.

    Raises:
        ConfigError: `decoder_sparse_step` is below 1.
    """
    if not has_experts(text):
        return {DENSE_MLP: layers, SPARSE_MLP: ()}
    if not is_read(text, "mlp_only_layers"):
        return {SPARSE_MLP: layers, DENSE_MLP: ()}
    step = text.require("decoder_sparse_step", int)
    dense = set(text.list_of("mlp_only_layers", int))
    if step < 1:
        raise ConfigError(
            f"{text.origin}: {text.dotted('decoder_sparse_step')} must be 1 or more, found "
            f"{quoted(step)}"
        )
    sparse = tuple(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)
    return {SPARSE_MLP: sparse, DENSE_MLP: tuple(sorted(set(layers) - set(sparse)))}


def sparse_layers(text: HFConfig) -> frozenset[int]:
    """The numbers of the layers that have routed experts."""
    return frozenset(mlp_kinds(text, decoder_layers(text))[SPARSE_MLP])


def layer_patterns(text: HFConfig) -> dict[str, int | list[int]]:
    """Fields of the provider that say which layers are of which kind; 1 stands for all layers.

    megatron-core keys checkpoints by them, too: see `layers_share_keys`.
    """
    layers = decoder_layers(text)
    patterns: dict[str, int | list[int]] = {}
    if has_experts(text):
        sparse = mlp_kinds(text, layers)[SPARSE_MLP]
        each = [int(layer in sparse) for layer in layers]
        patterns["moe_layer_freq"] = 1 if all(each) else each
    if has_delta_net(text):
        linear = attention_kinds(text, layers)[LINEAR_ATTENTION]
        patterns["linear_attention_freq"] = [int(layer in linear) for layer in layers]
    return patterns


def expert_count(text: HFConfig) -> int:
    """How many routed experts a layer has."""
    return text.count("num_experts", MAX_PARTS)


def deepstack_layers(vision: HFConfig) -> list[int]:
    """The vision layers that hand features to the text model, each through a merger of its own.

    Raises:
        ConfigError: the config names a layer twice, or one that the encoder does not have.
    """
    key = "deepstack_visual_indexes"
    if not is_read(vision, key):
        return []
    layers = vision.list_of(key, int)
    depth = vision.count("depth")
    if len(set(layers)) < len(layers) or not all(0 <= layer < depth for layer in layers):
        raise ConfigError(
            f"{vision.origin}: vision_config.deepstack_visual_indexes should name some of "
            f"{depth} layers, found {quoted(layers)}"
        )
    return layers
