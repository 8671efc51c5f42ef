"""The providers of Qwen3-VL models, dense and with a mixture of experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import Qwen3VLModel
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_config import VisionConfig
from megatron.bridge.runtime.cpu import megatron_on_cpu


@dataclass
class Qwen3VLModelProvider(ModelProvider):
    """Config and builder of dense Qwen3-VL models, and the base of the other families.

    The fields of megatron-core's TransformerConfig describe the language model.

    Attributes:
        vision: shape of the vision encoder.
        ssm_dtype: of the parameters A_log and out_norm of linear attention; None for
            `params_dtype`.
        rotary_base: theta of the language model.
        rotary_percent: part of a head that is rotated.
        mrope_section: frequencies per axis (temporal, height, width); they sum to half of the
            rotated part of a head.
        add_attention_output_bias: bias of the attention's output projection, which megatron-core
            otherwise ties to that of the MLP (`add_bias_linear`).
        image_token_id: placeholder of one image feature in the prompt.
        video_token_id: placeholder of one video feature.
        vision_start_token_id: precedes the placeholders of an image or a frame.
        vision_end_token_id: follows them.
        freeze_language_model: build the language model without gradients.
        freeze_vision_model: likewise the encoder without its mergers.
        freeze_vision_projection: likewise the mergers.
    """

    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-6
    gated_linear_unit: bool = True
    activation_func: Callable[[Tensor], Tensor] = F.silu
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    add_attention_output_bias: bool = False
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    position_embedding_type: Literal["mrope"] = "mrope"
    rotary_base: float = 5_000_000.0
    rotary_percent: float = 1.0
    mrope_section: list[int] = field(default_factory=lambda: [24, 20, 20])
    scatter_embedding_sequence_parallel: bool = False

    # Required like the sizes of the language model: `finalize()` refuses its absence.
    vision: VisionConfig = None  # type: ignore[assignment]
    ssm_dtype: torch.dtype | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """A provider from plain values, as a bridge derives them and a checkpoint records them.

        Dtypes are torch names ("bfloat16"), `vision` is a mapping of VisionConfig's fields.
        """
        vision = dict(settings["vision"])
        vision["deepstack_visual_indexes"] = tuple(vision["deepstack_visual_indexes"])
        fields = {**settings, "vision": VisionConfig(**vision)}
        for name in ("params_dtype", "ssm_dtype"):
            if isinstance(dtype := settings.get(name), str):
                fields[name] = getattr(torch, dtype)
        return cls(**fields)

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = super().problems()
        for name, only in self.fixed_fields().items():
            if (found := getattr(self, name)) != only:
                problems.append(f"{name} is {found!r}: {type(self).__name__} needs {only!r}")
        problems += [
            f"{name} is {getattr(self, name)!r}: it must be set to a positive number"
            for name in self.required_sizes()
            if not (getattr(self, name) or 0) > 0
        ]
        for name in ("linear_attention_freq", "moe_layer_freq"):
            pattern = getattr(self, name)
            if isinstance(pattern, list) and len(pattern) != self.num_layers:
                problems.append(
                    f"{name} has {len(pattern)} entries, expected one for each of the "
                    f"num_layers = {self.num_layers} layers"
                )
        if (self.num_moe_experts or 0) > 0 and self.moe_router_topk > self.num_moe_experts:
            problems.append(
                f"moe_router_topk is {self.moe_router_topk}, more than num_moe_experts = "
                f"{self.num_moe_experts}"
            )
        # megatron-core says so as well, but of groups of ranks, and these take minutes to make.
        if self.num_moe_experts:
            for name, split in (
                ("num_moe_experts", "expert_model_parallel_size"),
                ("moe_ffn_hidden_size", "expert_tensor_parallel_size"),
            ):
                size, parts = getattr(self, name) or 0, getattr(self, split) or 1
                if 0 < size < parts:
                    problems.append(f"{name} is {size}, and {split} is {parts}: it splits no more")
        missing = [name for name in ("kv_channels", "vision") if getattr(self, name) is None]
        problems += [f"{name} is None: it must be set" for name in missing]
        if "kv_channels" not in missing:
            rotated = int(self.kv_channels * self.rotary_percent)
            if rotated != 2 * sum(self.mrope_section):
                problems.append(
                    f"mrope_section is {self.mrope_section}, which sums to "
                    f"{sum(self.mrope_section)}: expected half of the {rotated} rotated channels "
                    f"of a head"
                )
        for name in ("image_token_id", "video_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                problems.append(
                    f"{name} is {getattr(self, name)}, outside of vocab_size = {self.vocab_size}"
                )
        if "vision" not in missing:
            problems += self.vision.problems(
                hidden_size=self.hidden_size,
                tensor_model_parallel_size=self.tensor_model_parallel_size,
            )
        return problems

    def fixed_fields(self) -> dict[str, Any]:
        """Fields that have one value in all models of the family, and that value."""
        return {
            "position_embedding_type": "mrope",
            "scatter_embedding_sequence_parallel": False,
            "apply_rope_fusion": False,
            "rotary_interleaved": False,
            "multi_latent_attention": False,
            "cpu_offloading": False,
            "num_moe_experts": None,
            "experimental_attention_variant": None,
            "mtp_num_layers": None,
        }

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return ()

    def finalize(self) -> None:
        """As ModelProvider; also, the layers that take deepstack must be on the first stage."""
        super().finalize()
        vp_stage = None if self.virtual_pipeline_model_parallel_size is None else 0
        try:
            first_stage = get_num_layers_to_build(self, vp_stage, pp_rank=0)
        except AssertionError as error:
            raise ConfigError(f"{type(self).__name__}: megatron-core refuses: {error}") from error
        if first_stage < (taps := len(self.vision.deepstack_visual_indexes)):
            raise ConfigError(
                f"the first pipeline stage gets {first_stage} decoder layers, and the first {taps} "
                f"need the deepstack features of the vision encoder, which is there. Lower "
                f"pipeline_model_parallel_size or virtual_pipeline_model_parallel_size."
            )

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Qwen3VLModel:
        """Build this rank's model; see ModelProvider.provide."""
        self.finalize()
        with megatron_on_cpu():
            pre_process, post_process = self.stage_ends(pre_process, post_process, vp_stage)
            model = Qwen3VLModel(
                self, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
            )
        model.freeze(
            freeze_language_model=self.freeze_language_model,
            freeze_vision_model=self.freeze_vision_model,
            freeze_vision_projection=self.freeze_vision_projection,
        )
        return model


@dataclass
class Qwen3VLMoEModelProvider(Qwen3VLModelProvider):
    """Config and builder of Qwen3-VL models with a mixture of experts.

    `moe_layer_freq` tells layers with experts from dense ones, `ffn_hidden_size` is the width of
    the dense ones. The router is Qwen's: softmax, the best `moe_router_topk`, their weights
    normalized to 1, which is what megatron-core computes as the softmax over the best logits.
    """

    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_aux_loss_coeff: float | list[float] = 1e-3

    def fixed_fields(self) -> dict[str, Any]:
        """Fields that have one value in all models of the family, and that value."""
        fixed = super().fixed_fields() | EXPERTS_FIXED_FIELDS
        return {name: value for name, value in fixed.items() if name != "num_moe_experts"}

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return (*super().required_sizes(), *EXPERTS_REQUIRED_SIZES)


# What every family with experts has in common.
EXPERTS_FIXED_FIELDS: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_enable_expert_bias": False,
    "moe_latent_size": None,
}
EXPERTS_REQUIRED_SIZES = ("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk")
