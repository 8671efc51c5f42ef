"""From a config.json to the ModelStructure that the rows of the language model need."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.models.conversion.config_values import padded_vocabulary
from megatron.bridge.models.conversion.layer_keys import (
    BY_CONFIG,
    KeyForms,
    layers_share_keys,
)
from megatron.bridge.models.conversion.structure import LanguageFields, ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import (
    head_dim,
    language_of,
)
from megatron.bridge.models.qwen_vl.config_layers import (
    attention_kinds,
    decoder_layers,
    expert_count,
    has_delta_net,
    has_experts,
    is_tied,
    layer_patterns,
    mlp_kinds,
)
from megatron.bridge.models.qwen_vl.heads import scores_of
from megatron.bridge.models.qwen_vl.parts import (
    ATTENTION_BIAS,
    DENSE_MLP,
    MTP_ATTENTION_BIAS,
    SCORE_BIAS,
    UNTIED_OUTPUT,
    WITH_MTP,
    Prefixes,
)


@dataclass(frozen=True)
class QwenLanguageFields(LanguageFields):
    """What layouts read of the language model of any family, named as in megatron-core.

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
        config: config of the whole model.
        prefixes: what the names of the language model begin with.
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
        num_moe_experts=expert_count(text) if has_experts(text) else 0,
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
