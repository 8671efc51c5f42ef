"""From a config.json to the ModelStructure that the rows need."""

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.structure import (
    AttentionFields,
    LanguageFields,
    ModelStructure,
)
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.rows import (
    ATTENTION_BIAS,
    DECODER_LAYERS,
    DEEPSTACK_MERGERS,
    LANGUAGE,
    UNTIED_OUTPUT,
    VISION,
    VISION_LAYERS,
)


def qwen_vl_structure(config: HFConfig, padded_vocab_size: int | None = None) -> ModelStructure:
    """Structure of a dense Qwen vision-language model.

    padded_vocab_size: rows of the Megatron embedding; without it, the vocabulary is padded as
    `padded_vocabulary` does. Raises ConfigError where the config lacks or contradicts a value.
    """
    text, vision = config.text, config.vision
    vocab_size = text.require("vocab_size", int)
    if padded_vocab_size is None:
        padded_vocab_size = padded_vocabulary(vocab_size)
    if padded_vocab_size < vocab_size:
        raise ConfigError(
            f"{config.origin}: {vocab_size} tokens do not fit into an embedding of "
            f"{padded_vocab_size} rows"
        )
    language_fields = LanguageFields(
        num_attention_heads=text.require("num_attention_heads", int),
        num_query_groups=text.require("num_key_value_heads", int),
        kv_channels=text.require("head_dim", int),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
    )
    vision_hidden = vision.require("hidden_size", int)
    vision_heads = vision.require("num_heads", int)
    vision_fields = AttentionFields(vision_heads, vision_heads, vision_hidden // vision_heads)
    layers = text.require("num_hidden_layers", int)
    blocks = vision.require("depth", int)
    features = set()
    if text.get("attention_bias", False):
        features.add(ATTENTION_BIAS)
    if not config.get("tie_word_embeddings", False):
        features.add(UNTIED_OUTPUT)
    return ModelStructure(
        dims={
            "V": vocab_size,
            "H": text.require("hidden_size", int),
            "I": text.require("intermediate_size", int),
            "Q": language_fields.num_attention_heads * language_fields.kv_channels,
            "K": language_fields.num_query_groups * language_fields.kv_channels,
            "d": language_fields.kv_channels,
            "h": vision_hidden,
            "3h": 3 * vision_hidden,
            "i": vision.require("intermediate_size", int),
            "D": vision_hidden * vision.require("spatial_merge_size", int) ** 2,
            "O": vision.require("out_hidden_size", int),
            "P": vision.require("num_position_embeddings", int),
            "c": vision.require("in_channels", int),
            "t": vision.require("temporal_patch_size", int),
            "p": vision.require("patch_size", int),
        },
        fields={LANGUAGE: language_fields, VISION: vision_fields},
        indices={
            DECODER_LAYERS: tuple(range(layers)),
            VISION_LAYERS: tuple(range(blocks)),
            DEEPSTACK_MERGERS: tuple(range(len(vision.get("deepstack_visual_indexes", [])))),
        },
        stacked=frozenset({DECODER_LAYERS, VISION_LAYERS}),
        features=frozenset(features),
    )


def padded_vocabulary(vocab_size: int, divisible_by: int = 128) -> int:
    """The next multiple; 128 is what megatron-core's clients pad to before tensor parallelism."""
    return -(-vocab_size // divisible_by) * divisible_by
