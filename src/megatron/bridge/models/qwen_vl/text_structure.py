"""From a config.json to the ModelStructure that the rows of the language model need."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.config_values import padded_vocabulary
from megatron.bridge.models.conversion.layer_keys import (
    BY_CONFIG,
    KeyForms,
    layers_share_keys,
)
from megatron.bridge.models.conversion.structure import LanguageFields, ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import (
    HYBRID,
    MOE,
    head_dim,
    is_read,
    language_of,
)
from megatron.bridge.models.qwen_vl.disk_layout import ExpertSizes
from megatron.bridge.models.qwen_vl.heads import scores_of
from megatron.bridge.models.qwen_vl.parts import (
    ATTENTION_BIAS,
    DENSE_MLP,
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    MTP_ATTENTION_BIAS,
    SCORE_BIAS,
    SPARSE_MLP,
    UNTIED_OUTPUT,
    WITH_MTP,
    Prefixes,
)
from megatron.bridge.text.quoting import quoted

MAX_PARTS = 1 << 18
"""Heads or experts of all layers together: more than any model has. A plan goes through all."""


@dataclass(frozen=True)
class QwenLanguageFields(LanguageFields):
    """What layouts read of the language model of any family; names of megatron-core.

    The fields of parts that a family does not have are 0.
    """

    num_moe_experts: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0


def language_structure(
    config: HFConfig,
    prefixes: Prefixes,
    padded_vocab_size: int | None = None,
    *,
    with_mtp: bool = False,
    keys: KeyForms = BY_CONFIG,
) -> ModelStructure:
    """Structure of the language model of any family.

    Args:
        config: of the whole model.
        prefixes: of the language model's names.
        padded_vocab_size: rows of the Megatron embedding; without it, the vocabulary is padded as
            `padded_vocabulary` does.
        with_mtp: whether there is an MTP layer to be mapped.
        keys: how the checkpoint keys are formed; what it leaves open is as megatron-core does for
            the provider that is made of the config.

    Raises:
        ConfigError: the config lacks or contradicts a value.
    """
    text = language_of(config)
    fields = _fields(text, padded_vocab_size)
    layers = decoder_layers(text)
    kinds = {**attention_kinds(text, layers), **mlp_kinds(text, layers)}
    experts = tuple(range(fields.num_moe_experts))
    indices = {prefixes.layers: layers}
    for layer in (prefixes.layer, prefixes.mtp_layer):
        indices |= {f"{layer.megatron}mlp.experts.linear_fc{n}.weight": experts for n in (1, 2)}
    stacked = keys.stacked.get(prefixes.layers, layers_share_keys(layer_patterns(text)))
    scores = scores_of(config)
    return ModelStructure(
        dims=_dims(text, fields, kinds) | ({"L": scores.labels} if scores else {}),
        fields={prefixes.megatron: fields},
        indices=indices,
        stacked=frozenset({prefixes.layers} if stacked else ()),
        features=_features(config, with_mtp=with_mtp),
        layer_kinds=kinds,
        experts=fields.num_moe_experts,
        sparse_norm_as_fused=keys.sparse_norm_as_fused,
    )


def _features(config: HFConfig, *, with_mtp: bool) -> frozenset[str]:
    """The optional parts that a model of this config has."""
    features = set()
    if language_of(config).require("attention_bias", bool):
        features.add(ATTENTION_BIAS)
    scores = scores_of(config)
    if scores is not None and scores.bias:
        features.add(SCORE_BIAS)
    if scores is None and not is_tied(config):
        features.add(UNTIED_OUTPUT)
    if with_mtp:
        features.add(WITH_MTP)
        if ATTENTION_BIAS in features:
            features.add(MTP_ATTENTION_BIAS)
    return frozenset(features)


def is_tied(config: HFConfig) -> bool:
    """Whether the output layer is the embedding."""
    return config.require("tie_word_embeddings", bool)


def has_experts(text: HFConfig) -> bool:
    """Whether a text config describes a mixture of experts."""
    return text.root.model_type in MOE


def has_delta_net(text: HFConfig) -> bool:
    """Whether a text config describes Gated DeltaNet layers."""
    return text.root.model_type in HYBRID


def expert_sizes(text: HFConfig) -> ExpertSizes:
    """What tells the disk layouts of experts apart."""
    return ExpertSizes(
        _experts(text), text.count("hidden_size"), text.count("moe_intermediate_size")
    )


def decoder_layers(text: HFConfig) -> tuple[int, ...]:
    """The numbers of the text model's layers."""
    parts = [text.count("num_key_value_heads", MAX_PARTS)]
    if has_experts(text):
        parts.append(_experts(text))
    if has_delta_net(text):
        parts.append(text.count("linear_num_key_heads", MAX_PARTS))
    return tuple(range(text.count("num_hidden_layers", MAX_PARTS // max(parts))))


def attention_kinds(text: HFConfig, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Which layers have full attention and which Gated DeltaNet, from `layer_types`."""
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


def _experts(text: HFConfig) -> int:
    return text.count("num_experts", MAX_PARTS)


def _fields(text: HFConfig, padded_vocab_size: int | None) -> QwenLanguageFields:
    delta = (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
    )
    return QwenLanguageFields(
        num_attention_heads=text.count("num_attention_heads"),
        num_query_groups=text.count("num_key_value_heads"),
        kv_channels=head_dim(text),
        vocab_size=text.count("vocab_size"),
        padded_vocab_size=padded_vocabulary(text, padded_vocab_size),
        num_moe_experts=_experts(text) if has_experts(text) else 0,
        **({name: text.count(name) for name in delta} if has_delta_net(text) else {}),
    )


def _dims(
    text: HFConfig, fields: QwenLanguageFields, kinds: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    hidden = text.count("hidden_size")
    queries = fields.num_attention_heads * fields.kv_channels
    dims = {
        "V": fields.vocab_size,
        "H": hidden,
        "2H": 2 * hidden,
        "Q": queries,
        "2Q": 2 * queries,
        "K": fields.num_query_groups * fields.kv_channels,
        "d": fields.kv_channels,
    }
    if kinds[DENSE_MLP]:
        dims["I"] = text.count("intermediate_size")
    if has_experts(text):
        intermediate = text.count("moe_intermediate_size")
        dims |= {"E": fields.num_moe_experts, "Ie": intermediate, "2Ie": 2 * intermediate}
    if has_experts(text) and has_delta_net(text):
        dims["Is"] = text.count("shared_expert_intermediate_size")
    if has_delta_net(text):
        keys = fields.linear_num_key_heads * fields.linear_key_head_dim
        values = fields.linear_num_value_heads * fields.linear_value_head_dim
        dims |= {
            "C": 2 * keys + values,
            "Z": values,
            "nv": fields.linear_num_value_heads,
            "dv": fields.linear_value_head_dim,
            "w": text.count("linear_conv_kernel_dim"),
        }
    return dims
