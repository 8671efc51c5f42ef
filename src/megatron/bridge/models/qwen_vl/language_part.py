"""The language model of a vision-language model as a model of text alone."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.bridge.errors import ConfigError, UnsupportedModel
from megatron.bridge.models.conversion.model_bridge import Tensors
from megatron.bridge.models.conversion.part import ModelPart
from megatron.bridge.models.conversion.spelling import Spelling
from megatron.bridge.models.hf_pretrained.config import DTYPE_KEYS, HFConfig
from megatron.bridge.models.qwen_vl.config_keys import (
    CONFIG_KEYS,
    MROPE_SECTION,
    Derived,
    Field,
    Ignored,
    is_read,
    language_of,
    uses_of,
)
from megatron.bridge.models.qwen_vl.config_layers import is_tied
from megatron.bridge.models.qwen_vl.disk_layout import ExpertLayout
from megatron.bridge.models.qwen_vl.names import VISION_LANGUAGE_ROOTS, Roots
from megatron.bridge.models.qwen_vl.parts import (
    ALONE,
    BESIDE_VISION,
    HF_HEAD,
    HF_MTP,
    HF_VISION,
    Prefixes,
)
from megatron.bridge.models.qwen_vl.qwen_bridge import QwenBridge
from megatron.bridge.models.qwen_vl.qwen_description import language_parts
from megatron.bridge.models.qwen_vl.qwen_text_bridges import QwenTextBridge
from megatron.bridge.models.qwen_vl.rope_config import read_rope

LANGUAGE = "language"

_ROTATION = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_OF_THE_FILE = ("architectures", "model_type", "quantization_config", *DTYPE_KEYS)
_AT_THE_TOP = ("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version")
"""Keys that the whole config may state in the place of its section."""


def language_part(whole: QwenBridge, alone: type[QwenTextBridge], config: HFConfig) -> ModelPart:
    """The language model of one vision-language model.

    Args:
        whole: the bridge of that model.
        alone: the bridge of the same language model alone.
        config: config of the whole model.

    Raises:
        ConfigError: the config lacks or contradicts a value.
        UnsupportedModel: the whole is a model without an output layer, or a classifier.
    """
    if config.architecture != whole.sources[0]:
        raise UnsupportedModel(
            f"{config.origin}: the language model of a {config.architecture} cannot be taken "
            f"alone, only that of a {whole.sources[0]}; name that class in architectures if it is "
            f"one"
        )
    whole.check(config)
    roots = {part: known for part, known in VISION_LANGUAGE_ROOTS.items() if part != HF_VISION}
    transposed = whole.released_layout.decoder is ExpertLayout.FUSED_TRANSPOSED
    return ModelPart(
        config=_config_alone(config, alone),
        in_files=_placed(
            alone,
            Prefixes(ALONE.megatron, BESIDE_VISION.hf),
            roots,
            released_layout=whole.released_layout,
            merges_experts=whole.merges_experts,
            elsewhere=(HF_VISION, *VISION_LANGUAGE_ROOTS[HF_VISION]),
        ),
        in_checkpoint=_placed(alone, Prefixes(BESIDE_VISION.megatron, ALONE.hf), alone.roots),
        root=BESIDE_VISION.megatron,
        own_names=partial(_own_names, whole, config),
        experts=alone.released_layout.decoder if transposed else None,
    )


def _placed(
    bridge: type[QwenTextBridge], prefixes: Prefixes, roots: Roots, **of_files: Any
) -> QwenTextBridge:
    """The bridge of a language model whose names begin otherwise on one of the sides.

    Args:
        bridge: the bridge of the language model alone.
        prefixes: what its names begin with.
        roots: roots of its parts in files.
        **of_files: what else is as in the files of another class.
    """
    names = {
        "prefixes": prefixes,
        "roots": roots,
        "layer_paths": (prefixes.layers,),
        "parts": language_parts(prefixes),
        "embedding_key": prefixes.embedding,
        "others_are": "it is no part of the language model",
        **of_files,
    }
    placed: type[QwenTextBridge] = type(bridge.__name__, (bridge,), names)
    return placed()


def _config_alone(config: HFConfig, alone: type[QwenTextBridge]) -> HFConfig:
    """config.json of the language model alone, which computes what it computes in the whole."""
    text, model_type = language_of(config), str(alone.model_type)
    beside, uses = uses_of(text), CONFIG_KEYS[model_type][""]
    read = {key for key, use in uses.items() if isinstance(use, Field | Derived)}
    # What means nothing in the whole must mean nothing alone.
    unsaid = {key for key in read if not is_read(text, key)}
    unsaid |= {
        key
        for key, use in beside.items()
        if isinstance(use, Ignored) and not isinstance(uses.get(key), Ignored)
    }
    gone = unsaid | {*_ROTATION, "quantization_config"}
    data = {key: value for key, value in text.data.items() if key not in gone}
    data |= {
        "architectures": [alone.sources[0]],
        "model_type": model_type,
        "tie_word_embeddings": is_tied(config),
        **_rotation(config, text, model_type),
    }
    if "norm_topk_prob" in read:
        data["norm_topk_prob"] = True  # which the class beside a vision tower always does
    for keys in (DTYPE_KEYS, *((key,) for key in _AT_THE_TOP)):
        if not any(map(text.has, keys)):
            data |= {key: config.require_any(key) for key in keys if config.has(key)}
    origin = f"{config.origin} ({text.path})"
    # The two classes have defaults of their own.
    defaults = HFConfig.from_dict(data, origin)
    for key in sorted(read - unsaid - {*_ROTATION, *_OF_THE_FILE}):
        value = _known(text, key)
        if value is not None and value != _known(defaults, key):
            data[key] = value
    return HFConfig.from_dict(data, origin)


def _known(view: HFConfig, key: str) -> Any:
    try:
        return view.require_any(key)
    except ConfigError:
        return None


def _rotation(config: HFConfig, text: HFConfig, model_type: str) -> dict[str, Any]:
    """The rotation, in the form that the config has: new (`rope_parameters`) or old."""
    rope = read_rope(config)
    kept: dict[str, Any] = {"rope_type": rope.rope_type, **rope.scaling}
    if model_type in MROPE_SECTION:
        kept |= {"mrope_section": list(rope.mrope_section), "mrope_interleaved": True}
    base: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1.0:
        base["partial_rotary_factor"] = rope.partial_rotary_factor
    if text.has("rope_scaling") or text.has("rope_theta"):
        return base | ({"rope_scaling": kept} if len(kept) > 1 else {})
    return {"rope_parameters": kept | base}


def _own_names(whole: QwenBridge, config: HFConfig, tensors: Tensors) -> Mapping[str, str]:
    """What the tensors of the language model are called alone -> their names in the whole."""
    spelling = whole.spelling(config, tensors)
    found = {}
    for name in tensors:
        declared = _declared(spelling, name)
        if declared.startswith(BESIDE_VISION.hf):
            found[ALONE.hf + declared.removeprefix(BESIDE_VISION.hf)] = name
        elif declared.startswith((HF_HEAD, HF_MTP)):
            found[declared] = name
    return found


def _declared(spelling: Spelling, name: str) -> str:
    """A name in files as rows have it; empty for another name of the same parameter."""
    if name in spelling.copies:
        return ""
    regular = spelling.regular(name)
    for root in sorted(spelling.roots, key=lambda root: -len(root.found)):
        if regular.startswith(root.found):
            return root.declared + regular.removeprefix(root.found)
    return name
