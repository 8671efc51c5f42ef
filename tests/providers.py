"""Providers for tests that need no files, and the process groups to build their models with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_config import VisionConfig
from megatron.bridge.models.qwen_vl.qwen3_vl_provider import (
    Qwen3VLModelProvider,
    Qwen3VLMoEModelProvider,
)
from megatron.bridge.models.qwen_vl.qwen35_vl_provider import (
    Qwen35VLModelProvider,
    Qwen35VLMoEModelProvider,
)
from megatron.bridge.runtime.parallel import (
    destroy_process_groups,
    initialize_process_groups,
)
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from oracle import tiny


def small_vision(**fields: Any) -> VisionConfig:
    sizes: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_heads": 6,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "out_hidden_size": 80,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": (0, 2),
    }
    return VisionConfig(**sizes | fields)


PROVIDERS: dict[str, type[Qwen3VLModelProvider]] = {
    "qwen3_vl": Qwen3VLModelProvider,
    "qwen3_vl_moe": Qwen3VLMoEModelProvider,
    "qwen3_5": Qwen35VLModelProvider,
    "qwen3_5_moe": Qwen35VLMoEModelProvider,
}
# Key of a text_config: field of a provider.
_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "num_experts": "num_moe_experts",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts_per_tok": "moe_router_topk",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
}


def _sizes(text: dict[str, Any]) -> dict[str, Any]:
    return {field: text[key] for key, field in _FIELDS.items() if key in text}


def small_provider(family: str = "qwen3_vl", **fields: Any) -> Qwen3VLModelProvider:
    """With the sizes of tiny.FAMILIES, but vision heads that two ranks can share."""
    _, text, deepstack = tiny.FAMILIES[family]
    sizes: dict[str, Any] = {
        "mrope_section": text["rope_parameters"]["mrope_section"],
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "vision": small_vision(deepstack_visual_indexes=tuple(deepstack)),
    }
    return PROVIDERS[family](**sizes | _sizes(tiny.TEXT | text) | fields)


def released_provider(config: dict[str, Any], **fields: Any) -> Qwen3VLModelProvider:
    """A dense provider with the sizes of a released config.json."""
    vision = config["vision_config"]
    names = VisionConfig.__dataclass_fields__.keys() & vision.keys()
    sizes: dict[str, Any] = {
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "vision": VisionConfig(**{name: vision[name] for name in names}),
    }
    return Qwen3VLModelProvider(**sizes | _sizes(config["text_config"]) | fields)


@contextmanager
def one_process() -> Iterator[None]:
    """Process groups of a world of one."""
    initialize_process_groups(ParallelSizes())
    try:
        yield
    finally:
        destroy_process_groups()
