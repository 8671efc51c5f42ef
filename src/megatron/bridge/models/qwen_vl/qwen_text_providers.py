"""The providers of Qwen models of text alone."""

from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.qwen_vl.family_fields import (
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

    def fixed_fields(self) -> dict[str, Any]:
        """Fields that have one value in all models of the family, and that value."""
        fixed = super().fixed_fields()
        return {name: value for name, value in fixed.items() if name != "moe_router_pre_softmax"}


@dataclass
class Qwen35ModelProvider(HybridFields, QwenModelProvider):
    """Config and builder of dense Qwen3.5 models of text."""


@dataclass
class Qwen35MoEModelProvider(SharedExpertFields, ExpertFields, HybridFields, QwenModelProvider):
    """Config and builder of Qwen3.5 models of text with a mixture of experts."""
