"""From a config.json to the part of a ModelStructure that the rows of the vision tower need."""

from dataclasses import replace

from megatron.bridge.models.conversion.layer_keys import BY_CONFIG, KeyForms
from megatron.bridge.models.conversion.structure import AttentionFields, ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_layers import MAX_PARTS, deepstack_layers
from megatron.bridge.models.qwen_vl.parts import DEEPSTACK_MERGERS, VISION, VISION_LAYERS


def with_vision(
    language: ModelStructure, config: HFConfig, keys: KeyForms = BY_CONFIG
) -> ModelStructure:
    """The structure of a language model and the vision tower beside it.

    Args:
        language: structure of the language model.
        config: config of the whole model.
        keys: how the checkpoint keys are formed.

    Raises:
        ConfigError: the config lacks or contradicts a value.
    """
    vision = config.vision
    heads = vision.count("num_heads", MAX_PARTS)
    fields = AttentionFields(heads, heads, vision.count("hidden_size") // heads)
    indices = {
        VISION_LAYERS: tuple(range(vision.count("depth", MAX_PARTS // heads))),
        DEEPSTACK_MERGERS: tuple(range(len(deepstack_layers(vision)))),
    }
    stacked = {VISION_LAYERS} if keys.stacked.get(VISION_LAYERS, True) else set()
    return replace(
        language,
        dims={**language.dims, **_dims(vision)},
        fields={**language.fields, VISION: fields},
        indices={**language.indices, **indices},
        stacked=language.stacked | stacked,
    )


def _dims(vision: HFConfig) -> dict[str, int]:
    hidden = vision.count("hidden_size")
    return {
        "h": hidden,
        "3h": 3 * hidden,
        "i": vision.count("intermediate_size"),
        "D": hidden * vision.count("spatial_merge_size") ** 2,
        "O": vision.count("out_hidden_size"),
        "P": vision.count("num_position_embeddings"),
        "c": vision.count("in_channels"),
        "t": vision.count("temporal_patch_size"),
        "p": vision.count("patch_size"),
    }
