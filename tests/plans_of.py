"""Plans of small configs without files: tensors are names, shapes and dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import released_configs as released
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.tensors.spec import TensorSpec

type Specs = dict[str, TensorSpec]

LANGUAGE = "model.language_model."
VISION = "model.visual."
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
HEAD = "lm_head.weight"

_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 300,
    "intermediate_size": 56,
    "moe_intermediate_size": 28,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 36,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
_VISION = {
    "depth": 3,
    "hidden_size": 24,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 40,
}


def small(config: dict[str, Any], **text: Any) -> dict[str, Any]:
    """A released config with its counts cut down; the output layer is not tied."""
    config = copy.deepcopy(config) | {"dtype": "bfloat16", "tie_word_embeddings": False}
    known = config["text_config"]
    known |= {key: value for key, value in _SIZES.items() if key in known} | text
    taps = [1] if "qwen3_vl" in config["model_type"] else []
    config["vision_config"] |= _VISION | {"deepstack_visual_indexes": taps}
    return config


VL = small(released.QWEN3_VL_8B)
VL_MOE = small(released.QWEN3_VL_30B_A3B)
DENSE_35 = small(released.QWEN3_5_9B)
MOE_35 = small(released.QWEN3_5_35B_A3B)
FAMILIES = {"vl": VL, "vl-moe": VL_MOE, "3.5": DENSE_35, "3.5-moe": MOE_35}
TIED = VL | {"tie_word_embeddings": True}


def tensors_of(config: dict[str, Any]) -> Specs:
    """What files of this config hold."""
    view = HFConfig.from_dict(config)
    return bridge_for(view.architecture).expected_tensors(view, "BF16")


def plan(
    config: dict[str, Any], tensors: Mapping[str, TensorSpec], **options: Any
) -> ConversionPlan:
    """The plan of files with these tensors."""
    view = HFConfig.from_dict(config)
    return bridge_for(view.architecture).plan(view, tensors, PlanOptions(**options))


def with_names(tensors: Specs, change: Callable[[str], str]) -> Specs:
    """The tensors, each named as `change` says."""
    return {change(name): replace(spec, name=change(name)) for name, spec in tensors.items()}


def added(tensors: Specs, **more: tuple[int, ...]) -> Specs:
    """With further tensors in BF16; two underscores in a name stand for a dot."""
    names = {name.replace("__", "."): shape for name, shape in more.items()}
    return tensors | {name: TensorSpec(name, shape, "BF16") for name, shape in names.items()}
