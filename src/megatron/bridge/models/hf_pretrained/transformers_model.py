"""A model of transformers with the weights of its files: what conversions are compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.fp8 import DequantizedTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM


def load_transformers_model(
    hf: PreTrainedVLM, auto_model: str | None, **kwargs: Any
) -> PreTrainedModel:
    """See `PreTrainedVLM.load_model`."""
    import transformers

    options: dict[str, Any] = {
        "attn_implementation": "eager",
        "output_loading_info": True,
        "trust_remote_code": hf.trust_remote_code,
    }
    options |= kwargs
    if hf.config_is_changed:
        options = {"config": copy.deepcopy(hf.config)} | options
    quantized = isinstance(hf.weights, DequantizedTensors)
    folder: Path | None = None
    if not quantized and hf.tensors.files_as_released:
        folder, name = hf.weights_folder, auto_model or _auto_model(hf.hf_config.model_type)
    else:
        config = copy.deepcopy(hf.config)
        if quantized:
            del config.quantization_config
        options |= {
            "config": config,
            "state_dict": {name: hf.weights.read(name) for name in hf.weights},
        }
        name = hf.hf_config.architecture  # without a folder, only a class of its own loads
    auto_class = getattr(transformers, name)
    model, found = load(hf.name_or_path, "model", auto_class, folder, **options)
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{hf.name_or_path}: transformers finds no {missing[0]} "
            f"({len(missing)} tensors are missing for it) and would make up random ones"
        )
    return model


def load(origin: str, what: str, auto_class: Any, folder: Path | None, **options: Any) -> Any:
    """What a class of transformers loads. Raises InputError, whatever keeps it from that."""
    try:
        return auto_class.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{origin}: transformers cannot load the {what}: {error}") from error


def _auto_model(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TAKE_PICTURES,
    )

    takes_pictures = model_type in TAKE_PICTURES
    return "AutoModelForImageTextToText" if takes_pictures else "AutoModelForCausalLM"
