"""The providers of Qwen3.5 models (also Qwen3.6), dense and with a mixture of experts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.bridge.models.qwen_vl.qwen3_vl_provider import (
    EXPERTS_FIXED_FIELDS,
    EXPERTS_REQUIRED_SIZES,
    Qwen3VLModelProvider,
    router_loss_problems,
    uses_router_loss,
)


@dataclass
class Qwen35VLModelProvider(Qwen3VLModelProvider):
    """Config and builder of dense Qwen3.5 models.

    Three of four layers mix tokens by the gated delta rule, the others by attention with an output
    gate: `linear_attention_freq` is megatron-core's, an interval or one entry per layer with 1 for
    the delta rule and 0 for attention. `mtp_num_layers` None builds no predictor of the token
    after the next, 1 builds the one that Qwen3.5 is released with.
    """

    layernorm_zero_centered_gamma: bool = True
    attention_output_gate: bool = True
    experimental_attention_variant: Literal["gated_delta_net"] = "gated_delta_net"
    linear_attention_freq: int | list[int] = 4
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    rotary_base: float = 10_000_000.0
    rotary_percent: float = 0.25
    mrope_section: list[int] = field(default_factory=lambda: [11, 11, 10])

    image_token_id: int = 248056
    video_token_id: int = 248057
    vision_start_token_id: int = 248053
    vision_end_token_id: int = 248054

    def fixed_fields(self) -> dict[str, Any]:
        """Fields that have one value in all models of the family, and that value."""
        fixed = super().fixed_fields() | {
            "layernorm_zero_centered_gamma": True,
            "attention_output_gate": True,
            "experimental_attention_variant": "gated_delta_net",
        }
        return {name: value for name, value in fixed.items() if name != "mtp_num_layers"}

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = super().problems()
        chunk = (self.recompute_method, self.recompute_num_layers)
        if self.mtp_num_layers and self.recompute_granularity == "full" and chunk != ("uniform", 1):
            problems.append(
                f"recompute_method is {chunk[0]!r} and recompute_num_layers is {chunk[1]}: full "
                f"recomputation with mtp_num_layers needs 'uniform' and 1"
            )
        stages = self.pipeline_model_parallel_size
        if self.mtp_num_layers and self.share_embeddings_and_output_weights and stages > 1:
            problems.append(
                f"pipeline_model_parallel_size is {stages}: megatron-core cannot share the output "
                f"layer's weight with an embedding on another stage beside mtp_num_layers = "
                f"{self.mtp_num_layers}. Set one of the two: 1 stage, or mtp_num_layers=None"
            )
        return problems

    def rotary_problems(self) -> list[str]:
        """Any part of a head can be rotated."""
        return []

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return (
            *super().required_sizes(),
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        )


@dataclass
class Qwen35VLMoEModelProvider(Qwen35VLModelProvider):
    """Config and builder of Qwen3.5 models with a mixture of experts.

    As Qwen3VLMoEModelProvider, with one more expert that every token goes to, weighed by a gate
    of its own. (Fields are repeated: a dataclass of two bases takes all of one and then all of the
    other.)
    """

    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_aux_loss_coeff: float | list[float] = 1e-3
    router_aux_loss_coef: float = 0.0
    moe_shared_expert_gate: bool = True

    @property
    def has_router_loss(self) -> bool:
        """Whether training has transformers' loss over the routers of all layers."""
        return uses_router_loss(self.router_aux_loss_coef, self.moe_aux_loss_coeff)

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        return super().problems() + router_loss_problems(self)

    def fixed_fields(self) -> dict[str, Any]:
        """Fields that have one value in all models of the family, and that value."""
        fixed = super().fixed_fields() | EXPERTS_FIXED_FIELDS | {"moe_shared_expert_gate": True}
        return {name: value for name, value in fixed.items() if name != "num_moe_experts"}

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return (
            *super().required_sizes(),
            *EXPERTS_REQUIRED_SIZES,
            "moe_shared_expert_intermediate_size",
        )
