"""Every key of the families' configs, and what becomes of it.

A test collects the keys from transformers' own config classes and modeling code: one that is not
here fails it. Each key is held by tests, too: a mapped one by transformers' logits, an irrelevant
one by logits that do not change.

    Field       sets fields of the provider
    Derived     is read by code, together with other keys
    Ignored     changes neither weights nor forward in transformers, and why
    Only        has one value that can be converted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.text.quoting import quoted

MTP_LAYERS = "mtp_num_hidden_layers"
"""The key that counts MTP layers."""

type Read = Callable[[HFConfig, str], Any]

MOE_TYPES = frozenset({"qwen3_vl_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_5_moe_text"})
"""Model types with routed experts."""
HYBRID_TYPES = frozenset({"qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"})
"""Model types with Gated DeltaNet layers."""
PARTIAL_ROTARY_TYPES = HYBRID_TYPES
"""Model types that rotate a part of each head."""
MROPE_SECTION: Mapping[str, tuple[int, int, int]] = {
    "qwen3_vl": (24, 20, 20),
    "qwen3_vl_moe": (24, 20, 20),
    "qwen3_5": (11, 11, 10),
    "qwen3_5_moe": (11, 11, 10),
    "qwen3_5_text": (11, 11, 10),
    "qwen3_5_moe_text": (11, 11, 10),
}
"""Model type -> the sections where the config has none: only transformers' modeling code has them.

In models of other types a token has one position.
"""


@dataclass(frozen=True)
class Field:
    """A key that sets the provider fields `names` to its value, as `read` reads it."""

    names: tuple[str, ...]
    read: Read


@dataclass(frozen=True)
class Derived:
    """A key that is read together with others; `of` names what it decides."""

    of: str


@dataclass(frozen=True)
class Ignored:
    """A key that changes nothing in transformers' model, and why."""

    why: str


@dataclass(frozen=True)
class Only:
    """A key of which one value can be converted: what `value` gives for the section, and why."""

    value: Callable[[HFConfig], Any]
    why: str


type Use = Field | Derived | Ignored | Only


def _token(config: HFConfig, key: str) -> int:
    return config.count(key, least=0)


def _of_kind(kind: type) -> Read:
    return lambda config, key: config.require(key, kind)


_flag, _word, _number = _of_kind(bool), _of_kind(str), _of_kind(float)


def head_dim(config: HFConfig, key: str = "head_dim") -> int:
    """The size of a head; where a qwen3_moe states none, its heads share the hidden size."""
    if config.root.model_type != "qwen3_moe" or config.has(key):
        return config.count(key)
    return max(config.count("hidden_size") // config.count("num_attention_heads"), 1)


def _counts(**fields: str) -> dict[str, Use]:
    return {key: Field((name,), HFConfig.count) for key, name in fields.items()}


def _same(*keys: str) -> dict[str, Use]:
    return {key: Field((key,), HFConfig.count) for key in keys}


def _ignored(why: str, *keys: str) -> dict[str, Use]:
    return dict.fromkeys(keys, Ignored(why))


# Of every config class.
_ANY: dict[str, Use] = {
    "per_layer_config": Only(lambda _: {}, "layers with configs of their own are not supported"),
    "dtype": Derived("params_dtype"),
    "torch_dtype": Derived("params_dtype"),
    "model_type": Derived("which class it is"),
    **_ignored(
        "it says what else is returned",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "tie_last_hidden_states",
        "use_cache",
    ),
    **_ignored("it says which kernels compute it", "attn_implementation", "experts_implementation"),
    **_ignored(
        "it names labels or tokens, which only a classifier knows",
        *("id2label", "label2id", "num_labels", "problem_type"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    ),
    **_ignored(
        "it describes the file",
        *("architectures", "transformers_version", "name_or_path", "_commit_hash"),
    ),
    **_ignored("no code of these models reads it", "chunk_size_feed_forward", "is_encoder_decoder"),
}
_TOP: dict[str, Use] = {
    **_ANY,
    "architectures": Derived("which bridge"),
    "text_config": Derived("the language model"),
    "vision_config": Derived("the vision tower"),
    "quantization_config": Derived("how weights are stored"),
    "image_token_id": Field(("image_token_id",), _token),
    "video_token_id": Field(("video_token_id",), _token),
    "vision_start_token_id": Field(("vision_start_token_id",), _token),
    "vision_end_token_id": Field(("vision_end_token_id",), _token),
    "tie_word_embeddings": Field(("share_embeddings_and_output_weights",), _flag),
    **_ignored(
        "the rotation is that of text_config",
        *("rope_theta", "rope_scaling", "partial_rotary_factor"),
    ),
}
_TEXT: dict[str, Use] = {
    **_ANY,
    **_counts(
        vocab_size="vocab_size",
        hidden_size="hidden_size",
        num_attention_heads="num_attention_heads",
        num_key_value_heads="num_query_groups",
        max_position_embeddings="seq_length",
    ),
    "head_dim": Field(("kv_channels",), head_dim),
    "num_hidden_layers": Derived("num_layers"),
    "intermediate_size": Derived("ffn_hidden_size"),
    "hidden_act": Field(("hidden_act",), _word),
    "attention_dropout": Field(("attention_dropout",), _number),
    "initializer_range": Field(("init_method_std",), _number),
    "rms_norm_eps": Field(("layernorm_epsilon",), HFConfig.positive),
    "attention_bias": Field(("add_qkv_bias", "add_attention_output_bias"), _flag),
    "rope_parameters": Derived("the rotation"),
    "rope_scaling": Derived("the rotation"),
    "rope_theta": Derived("the rotation"),
    "tie_word_embeddings": Ignored("the flag beside text_config ties"),
}
_EXPERTS: dict[str, Use] = {
    "num_experts": Derived("num_moe_experts"),
    "num_experts_per_tok": Derived("moe_router_topk"),
    "moe_intermediate_size": Field(("moe_ffn_hidden_size",), HFConfig.count),
    "output_router_logits": Derived("the auxiliary loss"),
    "router_aux_loss_coef": Derived("the auxiliary loss"),
    "norm_topk_prob": Ignored("the weights of the chosen experts are always normalized"),
}
_VL = {
    "partial_rotary_factor": Ignored("heads are rotated as a whole"),
    "layer_types": Ignored("every layer has full attention"),
    "sliding_window": Ignored("every layer has full attention"),
}
_VL_EXPERTS: dict[str, Use] = {
    "num_local_experts": Derived("num_moe_experts"),
    "decoder_sparse_step": Derived("moe_layer_freq"),
    "mlp_only_layers": Derived("moe_layer_freq"),
}
_HYBRID: dict[str, Use] = {
    **_same(
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
    ),
    "layer_types": Derived("linear_attention_freq"),
    "full_attention_interval": Derived("linear_attention_freq"),
    "partial_rotary_factor": Derived("the rotation"),
    "attn_output_gate": Ignored("attention always has an output gate"),
    "mamba_ssm_dtype": Derived("dtypes of files that are not at hand"),
    MTP_LAYERS: Derived("the MTP layer"),
    "mtp_use_dedicated_embeddings": Derived("the MTP layer"),
}
_HYBRID_EXPERTS: dict[str, Use] = {
    **_counts(shared_expert_intermediate_size="moe_shared_expert_intermediate_size"),
    **_ignored(
        "every layer has experts",
        *("decoder_sparse_step", "mlp_only_layers", "intermediate_size", "num_local_experts"),
    ),
}
# The language model as a model of its own: one section.
_ALONE: dict[str, Use] = {
    "architectures": Derived("which bridge"),
    "quantization_config": Derived("how weights are stored"),
    "tie_word_embeddings": Field(("share_embeddings_and_output_weights",), _flag),
}
_QWEN3: dict[str, Use] = {
    "partial_rotary_factor": Ignored("heads are rotated as a whole"),
    "sliding_window": Derived("window_size"),
    "use_sliding_window": Derived("window_size"),
}
_QWEN3_DENSE: dict[str, Use] = {
    "layer_types": Derived("window_size"),
    "max_window_layers": Derived("window_size"),
}
_QWEN3_EXPERTS: dict[str, Use] = {
    "norm_topk_prob": Derived("moe_router_pre_softmax"),
}
_VISION: dict[str, Use] = {
    **_ANY,
    **_same(
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "patch_size",
        "temporal_patch_size",
        "in_channels",
        "spatial_merge_size",
        "out_hidden_size",
        "num_position_embeddings",
    ),
    "hidden_act": Field(("hidden_act",), _word),
    "head_dim": Only(
        lambda vision: vision.count("hidden_size") // vision.count("num_heads"),
        "transformers rotates another part of a head than there is",
    ),
    "num_attention_heads": Derived("num_heads, of which it is another name"),
    "num_hidden_layers": Derived("depth, of which it is another name"),
    "rope_parameters": Derived("the rotation"),
    "rope_scaling": Derived("the rotation"),
    "rope_theta": Derived("the rotation"),
    "initializer_range": Field(("initializer_range",), _number),
    "partial_rotary_factor": Ignored("heads are rotated as a whole"),
}
_DEEPSTACK: dict[str, Use] = {"deepstack_visual_indexes": Derived("deepstack_visual_indexes")}
_NO_DEEPSTACK: dict[str, Use] = {
    "deepstack_visual_indexes": Ignored("these models have no deepstack")
}

type Section = Mapping[str, Use]

CONFIG_KEYS: Mapping[str, Mapping[str, Section]] = {
    "qwen3_vl": {
        "": _TOP,
        "text_config": _TEXT | _VL,
        "vision_config": _VISION | _DEEPSTACK,
    },
    "qwen3_vl_moe": {
        "": _TOP,
        "text_config": _TEXT | _EXPERTS | _VL | _VL_EXPERTS,
        "vision_config": _VISION | _DEEPSTACK,
    },
    "qwen3_5": {
        "": _TOP,
        "text_config": _TEXT | _HYBRID,
        "vision_config": _VISION | _NO_DEEPSTACK,
    },
    "qwen3_5_moe": {
        "": _TOP,
        "text_config": _TEXT | _EXPERTS | _HYBRID | _HYBRID_EXPERTS,
        "vision_config": _VISION | _NO_DEEPSTACK,
    },
    "qwen3": {"": _TEXT | _ALONE | _QWEN3 | _QWEN3_DENSE},
    "qwen3_moe": {"": _TEXT | _ALONE | _EXPERTS | _VL_EXPERTS | _QWEN3 | _QWEN3_EXPERTS},
    "qwen3_5_text": {"": _TEXT | _ALONE | _HYBRID},
    "qwen3_5_moe_text": {"": _TEXT | _ALONE | _EXPERTS | _HYBRID | _HYBRID_EXPERTS},
}
"""Model type -> section -> key -> what becomes of it."""


def language_of(config: HFConfig) -> HFConfig:
    """The config of the language model: the whole one, or the part of it that describes text.

    Raises:
        ConfigError: no family has the model type.
    """
    if config.model_type not in CONFIG_KEYS:
        raise ConfigError(
            f"{config.origin}: model_type {quoted(config.model_type)} is none of "
            f"{', '.join(CONFIG_KEYS)}; state that of the model"
        )
    return config.text if "text_config" in CONFIG_KEYS[config.model_type] else config


def is_read(view: HFConfig, key: str) -> bool:
    """Whether transformers' model of this type reads a key of this section."""
    return isinstance(uses_of(view).get(key), Field | Derived)


def uses_of(view: HFConfig) -> Section:
    """What becomes of each key of the section that `view` shows."""
    return CONFIG_KEYS[view.root.model_type][view.path]


def check_keys(config: HFConfig) -> None:
    """Raise ConfigError for a key with a value that cannot be converted."""
    for section, uses in CONFIG_KEYS[config.model_type].items():
        view = config.section(section) if section else config
        for key, use in uses.items():
            if isinstance(use, Only) and view.has(key):
                found, only = view.require_any(key), use.value(view)
                if found != only:
                    raise ConfigError(
                        f"{config.origin}: {view.dotted(key)} is {quoted(found)}; only "
                        f"{quoted(only)} can be converted: {use.why}"
                    )


def field_settings(view: HFConfig) -> dict[str, Any]:
    """Provider fields that single keys of a section set."""
    return {
        name: use.read(view, key)
        for key, use in uses_of(view).items()
        if isinstance(use, Field)
        for name in use.names
    }
