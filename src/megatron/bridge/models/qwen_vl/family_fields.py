"""What the families' language models add to the fields of their providers.

The classes are no providers themselves: a provider names those that it has before its base. Fields
that have one value in all models of a family are composed of the mappings here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

type Fixed = dict[str, Any]
"""Fields that have one value, and that value."""

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider as _Mixin
else:
    # A dataclass takes all fields of one base and then all of the other, defaults included: what
    # adds fields must not inherit those of the provider.
    _Mixin = object

COMMON: Fixed = {
    "position_embedding_type": "mrope",
    "scatter_embedding_sequence_parallel": False,
    "apply_rope_fusion": False,
    "fused_single_qkv_rope": False,
    "test_mode": False,
    "rotary_interleaved": False,
    "multi_latent_attention": False,
    "cpu_offloading": False,
    "window_size": None,
    "qk_l2_norm": False,
    "heterogeneous_block_specs": False,
}
"""Fixed in every language model."""
ATTENTION: Fixed = {"experimental_attention_variant": None, "mtp_num_layers": None}
"""Fixed where each layer has attention, and nothing predicts the token after the next."""
HYBRID: Fixed = {
    "layernorm_zero_centered_gamma": True,
    "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net",
}
"""Fixed in models with HybridFields."""
DENSE: Fixed = {"num_moe_experts": None}
"""Fixed where each layer has one MLP."""
EXPERTS: Fixed = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_enable_expert_bias": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
}
"""Fixed in models with ExpertFields."""
NORMALIZED: Fixed = {"moe_router_pre_softmax": False}
"""Fixed where the router normalizes the weights of the chosen experts to 1."""
SHARED_EXPERT: Fixed = {
    "moe_shared_expert_gate": True,
    "moe_shared_expert_glu_interleave_size": None,
}
"""Fixed in models with SharedExpertFields."""

_EXPERTS_REQUIRED = ("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk")


@dataclass
class HybridFields(_Mixin):
    """Gated DeltaNet layers, as in Qwen3.5.

    Three of four layers mix tokens by the gated delta rule, the others by attention with an output
    gate. `mtp_num_layers` None builds no predictor of the token after the next, 1 builds the one
    that Qwen3.5 is released with.

    Attributes:
        linear_attention_freq: which layers have the delta rule, as in megatron-core: an interval,
            or one entry per layer with 1 for the delta rule and 0 for attention.
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

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = super().problems()
        chunk = (self.recompute_method, self.recompute_num_layers)
        if self.mtp_num_layers and self.recompute_granularity == "full" and chunk != ("uniform", 1):
            problems.append(
                f"recompute_method is {chunk[0]!r} and recompute_num_layers is {chunk[1]}: full "
                f"recomputation with mtp_num_layers needs 'uniform' and 1"
            )
        return problems + self._context_parallel_problems()

    def _context_parallel_problems(self) -> list[str]:
        """What keeps ranks from sharing sequences."""
        ranks, parts = self.tensor_model_parallel_size, self.context_parallel_size
        if parts == 1:
            return []
        problems = [
            f"{name} is {heads}, not a multiple of tensor_model_parallel_size = {ranks} times "
            f"context_parallel_size = {parts}, which share these heads out: lower one of them"
            for name in ("linear_num_key_heads", "linear_num_value_heads")
            if (heads := getattr(self, name)) % (ranks * parts)
        ]
        if self.mtp_num_layers:
            problems.append(
                f"context_parallel_size is {parts} with mtp_num_layers = {self.mtp_num_layers}: "
                f"megatron-core takes the mean of the second loss rank by rank then. Set one of "
                f"them: context_parallel_size=1, or mtp_num_layers=None"
            )
        return problems

    def rotary_problems(self) -> list[str]:
        """There are none: any part of a head can be rotated."""
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
class ExpertFields(_Mixin):
    """A mixture of experts in some or all layers.

    `moe_layer_freq` tells layers with experts from dense ones, `ffn_hidden_size` is the width of
    the dense ones. The router is Qwen's: softmax, the best `moe_router_topk`, their weights
    normalized to 1, which is what megatron-core computes as the softmax over the best logits.

    Attributes:
        router_aux_loss_coef: weight of the loss that transformers has over the routers of all
            layers, 0 for none. Not used where `moe_aux_loss_coeff` is not 0: that asks for
            megatron-core's loss, layer by layer, in its place. A provider that is made from a
            config has `moe_aux_loss_coeff` 0, and this one if the config has output_router_logits.
    """

    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_aux_loss_coeff: float | list[float] = 1e-3
    router_aux_loss_coef: float = 0.0

    @property
    def has_router_loss(self) -> bool:
        """Whether training has transformers' loss over the routers of all layers."""
        coeff = self.moe_aux_loss_coeff
        of_megatron = coeff if isinstance(coeff, list) else [coeff]
        return self.router_aux_loss_coef != 0.0 and not any(of_megatron)

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = super().problems()
        if self.moe_apply_probs_on_input and self.moe_router_topk != 1:
            problems.append(
                f"moe_apply_probs_on_input is True with moe_router_topk = {self.moe_router_topk}: "
                f"it is for one expert per token; set it to False"
            )
        return problems + self._router_loss_problems()

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return (*super().required_sizes(), *_EXPERTS_REQUIRED)

    def _router_loss_problems(self) -> list[str]:
        """What is wrong with a layout in which no rank has the routers of all layers."""
        stages = self.pipeline_model_parallel_size
        if not self.has_router_loss or stages == 1:
            return []
        problem = (
            f"pipeline_model_parallel_size is {stages} with router_aux_loss_coef "
            f"(output_router_logits in the config): that loss needs the routers of all layers on "
            f"one stage. Set pipeline_model_parallel_size=1, or take router_aux_loss_coef=0, or "
            f"megatron-core's own loss with moe_aux_loss_coeff"
        )
        return [problem]


@dataclass
class SharedExpertFields(_Mixin):
    """An expert beside the routed ones, for every token, weighed by a gate of its own."""

    moe_shared_expert_gate: bool = True

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return (*super().required_sizes(), "moe_shared_expert_intermediate_size")
