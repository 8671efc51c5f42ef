"""The providers of Qwen3.5 vision-language models (also Qwen3.6), dense and with experts."""

from dataclasses import dataclass

from megatron.bridge.models.qwen_vl.family_fields import (
    COMMON,
    DENSE,
    EXPERTS,
    HYBRID,
    NORMALIZED,
    SHARED_EXPERT,
    ExpertFields,
    HybridFields,
    SharedExpertFields,
)
from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider


@dataclass
class Qwen35VLModelProvider(HybridFields, Qwen3VLModelProvider):
    """Config and builder of dense Qwen3.5 models."""

    fixed = COMMON | HYBRID | DENSE

    image_token_id: int = 248056
    video_token_id: int = 248057
    vision_start_token_id: int = 248053
    vision_end_token_id: int = 248054


@dataclass
class Qwen35VLMoEModelProvider(SharedExpertFields, ExpertFields, Qwen35VLModelProvider):
    """Config and builder of Qwen3.5 models with a mixture of experts."""

    fixed = COMMON | HYBRID | EXPERTS | NORMALIZED | SHARED_EXPERT
