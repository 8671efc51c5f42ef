"""The providers of Qwen3-VL models, dense and with a mixture of experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.backends.activations import activation, activation_problem
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import Qwen3VLModel
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.decoder_spec import (
    DecoderSpec,
    decoder_spec,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_frequencies import (
    DEFAULT,
    RotaryFrequencies,
    rope_parameters_of_type,
)
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
        mrope_section: frequencies per axis (temporal, height, width), as transformers reads them:
            of each three frequencies the second one turns with the height among the first
            3 * mrope_section[1], the third one with the width among the first
            3 * mrope_section[2], all others with the temporal position.
        rope_parameters: `rope_type` and what belongs to it, with the keys and the meaning of
            `rope_parameters` in transformers; empty for the default type. What rotary_base,
            rotary_percent and mrope_section say does not stand here.
        transformer_layer_spec: the decoder's layers, in the place of those of the family: a spec of
            megatron-core (of every layer, or TransformerBlockSubmodules of a pipeline stage), or a
            callable that makes one, called with the provider, and with `vp_stage` if it takes that.
            Layers of multi-token prediction are not made by it.
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
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    scatter_embedding_sequence_parallel: bool = False

    transformer_layer_spec: DecoderSpec | Callable[..., DecoderSpec] = decoder_spec

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

        Dtypes are torch names ("bfloat16"), `vision` is a mapping of VisionConfig's fields,
        `hidden_act` the name of the activation, `rope_parameters` that of transformers' config.
        """
        vision = dict(settings["vision"])
        vision["deepstack_visual_indexes"] = tuple(vision["deepstack_visual_indexes"])
        fields = {**settings, "vision": VisionConfig(**vision)}
        if "hidden_act" in fields:
            fields["activation_func"] = activation(fields.pop("hidden_act"))
        if "rope_parameters" in fields:
            fields["rope_parameters"] = rope_parameters_of_type(
                fields["rope_parameters"], max_position_embeddings=settings["seq_length"]
            )
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
            problems += self.rotary_frequencies.problems() or self.rotary_problems()
        if len(self.mrope_section) != 3 or min(self.mrope_section) < 0:
            problems.append(
                f"mrope_section is {self.mrope_section}: expected three counts of frequencies"
            )
        if (reason := activation_problem(self.activation_func)) is not None:
            name = getattr(self.activation_func, "__name__", "")
            problems.append(f"activation_func is {name!r} (hidden_act): {reason}")
        if not 0 <= self.attention_dropout <= 1:
            problems.append(
                f"attention_dropout is {self.attention_dropout}: expected a share from 0 to 1"
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

    @property
    def rotary_frequencies(self) -> RotaryFrequencies:
        """The frequencies that rotary_base, rotary_percent and rope_parameters give."""
        return RotaryFrequencies(
            self.kv_channels, self.rotary_percent, self.rotary_base, self.rope_parameters
        )

    @property
    def has_router_loss(self) -> bool:
        """Whether training has transformers' loss over the routers of all layers."""
        return False

    def rotary_problems(self) -> list[str]:
        """What this family cannot do with frequencies that can be computed."""
        frequencies, problems = self.rotary_frequencies, []
        if frequencies.rope_type != DEFAULT and frequencies.rotated() != self.kv_channels:
            problems.append(
                f"rotary_percent is {self.rotary_percent} with rope_type "
                f"{frequencies.rope_type!r}: transformers rotates whole heads in this family, set "
                f"1.0"
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
        # Without stages the features that no layer is there for are left over.
        taps = min(len(self.vision.deepstack_visual_indexes), self.num_layers)
        if first_stage < taps:
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
        return uses_router_loss(self.router_aux_loss_coef, self.moe_aux_loss_coeff)

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        return super().problems() + router_loss_problems(self)

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


def uses_router_loss(coef: float, megatron_coeff: float | list[float]) -> bool:
    """Whether the loss over all routers is asked for, and not megatron-core's in its place."""
    of_megatron = megatron_coeff if isinstance(megatron_coeff, list) else [megatron_coeff]
    return coef != 0.0 and not any(of_megatron)


def router_loss_problems(provider: Qwen3VLModelProvider) -> list[str]:
    """A layout in which no rank has the routers of all layers."""
    stages = provider.pipeline_model_parallel_size
    if not provider.has_router_loss or stages == 1:
        return []
    problem = (
        f"pipeline_model_parallel_size is {stages} with router_aux_loss_coef "
        f"(output_router_logits in the config): that loss needs the routers of all layers on one "
        f"stage. Set pipeline_model_parallel_size=1, or take router_aux_loss_coef=0, or "
        f"megatron-core's own loss with moe_aux_loss_coeff"
    )
    return [problem]
