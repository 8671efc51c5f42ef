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


_EXPERTS = {"num_moe_experts": 7, "moe_ffn_hidden_size": 28, "moe_router_topk": 3}
_HYBRID: dict[str, Any] = {
    "kv_channels": 64,
    "mrope_section": [3, 3, 2],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 26,
    "linear_value_head_dim": 22,
}
FAMILIES: dict[str, tuple[type[Qwen3VLModelProvider], dict[str, Any]]] = {
    "qwen3_vl": (Qwen3VLModelProvider, {}),
    "qwen3_vl_moe": (Qwen3VLMoEModelProvider, _EXPERTS),
    "qwen3_5": (Qwen35VLModelProvider, _HYBRID),
    "qwen3_5_moe": (
        Qwen35VLMoEModelProvider,
        _HYBRID | _EXPERTS | {"moe_shared_expert_intermediate_size": 36},
    ),
}


def small_provider(family: str = "qwen3_vl", **fields: Any) -> Qwen3VLModelProvider:
    provider, of_family = FAMILIES[family]
    deepstack = () if family.startswith("qwen3_5") else (0, 2)
    sizes: dict[str, Any] = {
        "num_layers": 5,
        "hidden_size": 80,
        "ffn_hidden_size": 144,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 16,
        "mrope_section": [4, 2, 2],
        "vocab_size": 307,
        "seq_length": 4096,
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "vision": small_vision(deepstack_visual_indexes=deepstack),
    }
    return provider(**sizes | of_family | fields)


def released_provider(config: dict[str, Any], **fields: Any) -> Qwen3VLModelProvider:
    """A provider with the sizes of a released config.json."""
    text, vision = config["text_config"], config["vision_config"]
    names = VisionConfig.__dataclass_fields__.keys() & vision.keys()
    sizes: dict[str, Any] = {
        "num_layers": text["num_hidden_layers"],
        "hidden_size": text["hidden_size"],
        "ffn_hidden_size": text["intermediate_size"],
        "num_attention_heads": text["num_attention_heads"],
        "num_query_groups": text["num_key_value_heads"],
        "kv_channels": text["head_dim"],
        "vocab_size": text["vocab_size"],
        "seq_length": text["max_position_embeddings"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "vision": VisionConfig(**{name: vision[name] for name in names}),
    }
    return Qwen3VLModelProvider(**sizes | fields)


@contextmanager
def one_process() -> Iterator[None]:
    """Process groups of a world of one."""
    initialize_process_groups(ParallelSizes())
    try:
        yield
    finally:
        destroy_process_groups()
