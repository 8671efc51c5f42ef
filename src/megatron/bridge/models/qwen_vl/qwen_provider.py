"""The provider of a Qwen language model: what all families have in common."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron.bridge.models.backends.activations import activation_problem
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.qwen_vl.family_fields import ATTENTION, COMMON, DENSE, Fixed
from megatron.bridge.models.qwen_vl.heads import Scores
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.decoder_spec import (
    DecoderSpec,
    decoder_spec,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_frequencies import (
    DEFAULT,
    RotaryFrequencies,
    rope_parameters_of_type,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.standalone import QwenModel
from megatron.bridge.runtime.cpu import megatron_on_cpu


@dataclass
class QwenModelProvider(ModelProvider):
    """Config and builder of dense models with attention in each layer, and the base of all others.

    Attributes:
        scores: the head of a classifier, in the place of the output layer; None for logits.
        ssm_dtype: dtype of the parameters A_log and out_norm of linear attention; None for
            `params_dtype`.
        rotary_base: theta of the language model.
        rotary_percent: part of a head that is rotated.
        mrope_section: frequencies per axis (temporal, height, width), as transformers reads them:
            of each three frequencies the second one turns with the height among the first
            3 * mrope_section[1], the third one with the width among the first
            3 * mrope_section[2], all others with the temporal position. In a model of text they are
            one, and [n, 0, 0] turns all n frequencies with it.
        rope_parameters: `rope_type` and what belongs to it, with the keys and the meaning of
            `rope_parameters` in transformers; empty for the default type. What rotary_base,
            rotary_percent and mrope_section say does not stand here.
        transformer_layer_spec: the decoder's layers, in the place of those of the family: a spec of
            megatron-core (of every layer, or TransformerBlockSubmodules of a pipeline stage), or a
            callable that makes one, called with the provider, and with `vp_stage` if it takes that.
            Layers of multi-token prediction are not made by it.
        add_attention_output_bias: bias of the attention's output projection, which megatron-core
            otherwise ties to that of the MLP (`add_bias_linear`).
    """

    model_class: ClassVar[Callable[..., MegatronModule]] = QwenModel
    """The class of the model that is built."""
    fixed: ClassVar[Fixed] = COMMON | ATTENTION | DENSE
    """Fields that have one value in all models of the family, and that value."""

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

    ssm_dtype: torch.dtype | None = None
    scores: Scores | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """A provider from plain values, as a bridge derives them and a checkpoint records them.

        `scores` is a mapping of the fields of Scores, and `rope_parameters` is that of
        transformers' config.
        """
        fields = dict(settings)
        if settings.get("scores") is not None:
            fields["scores"] = Scores(**settings["scores"])
        if settings.get("window_size") is not None:
            fields["window_size"] = tuple(settings["window_size"])
        if "rope_parameters" in fields:
            fields["rope_parameters"] = rope_parameters_of_type(
                fields["rope_parameters"], max_position_embeddings=settings["seq_length"]
            )
        return super().from_settings(fields)

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = super().problems()
        for name, only in self.fixed.items():
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
        problems += self._problems_of_split_experts()
        if self.kv_channels is None:
            problems.append("kv_channels is None: it must be set")
        else:
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
        if self.scores is not None and self.mtp_num_layers:
            problems.append(
                f"mtp_num_layers is {self.mtp_num_layers} in a classifier, which predicts no "
                f"token: set it to None"
            )
        if self.scores is not None and self.share_embeddings_and_output_weights:
            problems.append(
                "share_embeddings_and_output_weights is True in a classifier, whose head is no "
                "embedding: set it to False"
            )
        of_sequences = self.scores is not None and not self.scores.each_token
        if of_sequences and self.context_parallel_size > 1:
            problems.append(
                f"context_parallel_size is {self.context_parallel_size} in a classifier of "
                f"sequences, whose last tokens one rank has: set it to 1"
            )
        return problems

    def _problems_of_split_experts(self) -> Iterator[str]:
        # megatron-core says so as well, but of groups of ranks, and these take minutes to make.
        if not self.num_moe_experts:
            return
        given = self.expert_tensor_parallel_size is not None
        for name, split in (
            ("num_moe_experts", "expert_model_parallel_size"),
            (
                "moe_ffn_hidden_size",
                "expert_tensor_parallel_size" if given else "tensor_model_parallel_size",
            ),
        ):
            size, parts = getattr(self, name) or 0, getattr(self, split)
            if size > 0 and size % parts:
                yield f"{name} is {size}, not a multiple of {split} = {parts}"

    @property
    def takes_deepstack(self) -> bool:
        """Whether the first layers of the decoder add features of pictures."""
        return False

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that stand for features of pictures, which no token predicts."""
        return ()

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

    def required_sizes(self) -> tuple[str, ...]:
        """Fields of the family that must be set to a positive number."""
        return ()

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        """Build this rank's model; see ModelProvider.provide."""
        self.finalize()
        with megatron_on_cpu():
            pre_process, post_process = self.stage_ends(pre_process, post_process, vp_stage)
            return type(self).model_class(
                self, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
            )
