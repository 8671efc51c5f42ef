"""The providers of Qwen models of text alone."""

from dataclasses import dataclass

from megatron.bridge.models.qwen_vl.family_fields import (
    ATTENTION,
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
from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider


@dataclass
class Qwen3ModelProvider(QwenModelProvider):
    """Config and builder of dense Qwen3 models."""


@dataclass
class Qwen3MoEModelProvider(ExpertFields, QwenModelProvider):
    """Config and builder of Qwen3 models with a mixture of experts.

    `moe_router_pre_softmax` leaves the weights of the chosen experts as they are among all, which
    is `norm_topk_prob` false in transformers.
    """

    fixed = COMMON | ATTENTION | EXPERTS


@dataclass
class Qwen35ModelProvider(HybridFields, QwenModelProvider):
    """Config and builder of dense Qwen3.5 models of text."""

    fixed = COMMON | HYBRID | DENSE


@dataclass
class Qwen35MoEModelProvider(SharedExpertFields, ExpertFields, HybridFields, QwenModelProvider):
    """Config and builder of Qwen3.5 models of text with a mixture of experts."""

    fixed = COMMON | HYBRID | EXPERTS | NORMALIZED | SHARED_EXPERT
