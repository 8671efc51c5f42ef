"""The language model: megatron-core's GPTModel with interleaved mRoPE and the layers of Qwen."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.decoder_spec import (
    predictor_spec,
    stage_spec,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.following_token import FollowingTokens
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.packing import with_padding_inside
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope import (
    InterleavedMultimodalRotaryEmbedding,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.router_loss import (
    CountedRouter,
    RouterCounts,
    RouterLoss,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.score_head import ScoreHead
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_checks import IGNORED_LABEL

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider

PADDING_LOGIT = -1e4
"""Of rows that no token has. It survives fp16, and a division by a temperature."""

# What GPTModel hands from its forward to the predictors as it is.
_FOR_PREDICTORS = (
    "position_ids",
    "attention_mask",
    "padding_mask",
    "rotary_pos_emb",
    "packed_seq_params",
)


class Qwen3VLTextModel(GPTModel):
    """One pipeline stage of a language model.

    Args:
        config: a finalized provider.
        pre_process: this is the first stage, which holds the embedding.
        post_process: this is the last stage, which holds the final norm and the output layer.
        vp_stage: virtual pipeline stage, None without interleaving.
        pg_collection: process groups; None for megatron-core's current ones.
    """

    def __init__(
        self,
        config: "QwenModelProvider",
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            config,
            transformer_layer_spec=stage_spec(config, vp_stage, groups.pp.rank()),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            # Whether logits are gathered is decided call by call: the loss needs them split.
            parallel_output=True,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            mtp_block_spec=predictor_spec(config),
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.unpadded_vocab_size = config.vocab_size
        tied = self.share_embeddings_and_output_weights
        if tied and self.mtp_process and post_process and not pre_process:
            # The predictors' copy of the embedding is what the output layer is called with.
            self.get_submodule("output_layer").register_parameter("weight", None)
        self.rotary_pos_emb = InterleavedMultimodalRotaryEmbedding(config.rotary_frequencies)
        if config.scores is not None and post_process:
            self.output_layer = ScoreHead(config, groups)
        self.router_loss = RouterLoss()
        for module in self.decoder.modules():
            if isinstance(module, CountedRouter):
                module.router_loss = self.router_loss

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """Run GPTModel; with labels the gradients have the routers' loss in them, if there is one.

        That loss is meant for a mean over the tokens: the gradients of the mean of what is
        returned are those of that mean plus `router_aux_loss_coef` times the routers' loss.
        """
        given |= {"labels": labels, "loss_mask": loss_mask}
        if not self.config.has_router_loss:
            return self._without_padding(super().forward(*args, **given), **given)
        counts = None
        if labels is not None and torch.is_grad_enabled():
            counts = RouterCounts(self._router_loss_weight(labels, loss_mask))
        self.router_loss.counts = counts
        try:
            output = self._without_padding(super().forward(*args, **given), **given)
        finally:
            self.router_loss.counts = None
        if counts is not None:
            groups, config = self.pg_collection, self.config
            counts.close(
                [groups.tp] * config.sequence_parallel
                + [groups.cp] * (config.context_parallel_size > 1)
            )
        return self.router_loss.attach(output, counts)

    def _without_padding(
        self, output: Tensor, *, labels: Tensor | None, runtime_gather_output: bool, **_: Any
    ) -> Tensor:
        """Give the padding of the vocabulary no share in a softmax over the logits."""
        if not self.post_process or labels is not None or self.config.scores is not None:
            return output
        parts = 1 if runtime_gather_output else self.pg_collection.tp.size()
        if output.shape[-1] != self.config.padded_vocab_size // parts:
            return output  # of a client's own head
        first = 0 if parts == 1 else self.pg_collection.tp.rank() * output.shape[-1]
        return self._padding_is(PADDING_LOGIT, output, first)

    def _padding_is(self, value: float, logits: Tensor, first: int) -> Tensor:
        """Logits [..., v] of the tokens from `first` on, with a value for those that are none."""
        real = self.unpadded_vocab_size - first
        if real >= logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= real
        return logits.masked_fill(padding, value)

    def _router_loss_weight(self, labels: Tensor, loss_mask: Tensor | None) -> Tensor | float:
        coef: float = self.config.router_aux_loss_coef
        if not self.config.calculate_per_token_loss:
            return coef
        tokens = (labels != IGNORED_LABEL if loss_mask is None else loss_mask).sum()
        if self.config.context_parallel_size > 1:
            dist.all_reduce(tokens, group=self.pg_collection.cp)
        return coef * tokens

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        input_ids: Tensor,
        labels: Tensor | None,
        decoder_input: Any,  # a Tensor where there are predictors
        mtp_in_postprocess: bool,
        runtime_gather_output: bool,
        **given: Any,
    ) -> Tensor:
        """Multi-token prediction with the embeddings of pictures, then logits or loss.

        megatron-core gives its predictors the embeddings of the tokens alone. Without labels
        outside of training there is nothing to predict for, and the predictors are not run.
        """
        if self.config.scores is not None:
            if not self.post_process:
                return hidden_states
            scores: Tensor = self.output_layer(hidden_states, input_ids)
            return scores
        predictors = self.config.mtp_num_layers or 0
        # Not all stages need have labels: those that predict for another one do it always.
        if predictors and self.post_process and labels is None and not self.training:
            if not self.mtp_process:
                hidden_states = hidden_states.chunk(1 + predictors)[0]
            weight = None
            if self.share_embeddings_and_output_weights:
                weight = self.shared_embedding_or_output_weight()
            logits, _ = self.output_layer(
                hidden_states, weight=weight, runtime_gather_output=runtime_gather_output
            )
            return logits.transpose(0, 1).contiguous()
        if predictors:
            given["packed_seq_params"] = with_padding_inside(given["packed_seq_params"])
        if mtp_in_postprocess:
            padding = given["padding_mask"]
            if padding is not None and self.config.sequence_parallel:
                padding = _gathered(padding, self.pg_collection.tp)
            hidden_states = self.mtp(
                input_ids=input_ids,
                hidden_states=hidden_states,
                embedding=FollowingTokens(self, decoder_input, padding),
                **{name: given[name] for name in _FOR_PREDICTORS},
            )
        if predictors and self.post_process:
            given["loss_mask"] = self._prediction_mask(input_ids, labels, **given)
        return super()._postprocess(
            hidden_states,
            input_ids=input_ids,
            labels=labels,
            decoder_input=decoder_input,
            mtp_in_postprocess=False,
            runtime_gather_output=runtime_gather_output,
            **given,
        )

    def _prediction_mask(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        *,
        loss_mask: Tensor | None,
        attention_mask: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """[b, s], what counts in the mean of the second loss: megatron-core divides by its sum.

        Tokens without a label do not count. Without labels the tokens themselves are the labels:
        then padding and the placeholders of pictures do not. megatron-core shifts it to the token
        before, so what follows padding does not count either: padding predicts nothing.
        """
        if labels is not None:
            counts = labels != IGNORED_LABEL
        else:
            counts = torch.ones_like(input_ids, dtype=torch.bool)
            for placeholder in self.config.placeholders:
                counts &= input_ids != placeholder
            if attention_mask is not None:
                counts = counts & ~attention_mask[:, 0, 0, :]
        if attention_mask is not None:
            counts = counts & ~torch.roll(attention_mask[:, 0, 0, :], 1, dims=1)
        return counts.float() if loss_mask is None else loss_mask * counts

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy per token, over the real vocabulary.

        Args:
            labels: [b, s]; -100 marks tokens without a loss.
            logits: [s, b, v], v this tensor-parallel rank's part of the padded vocabulary.

        Returns:
            fp32 [b, s], zero where the label is -100.
        """
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        logits = self._padding_is(torch.finfo(logits.dtype).min, logits, first)
        ignored = labels == IGNORED_LABEL
        loss = super().compute_language_model_loss(labels.masked_fill(ignored, 0), logits)
        return loss.masked_fill(ignored, 0.0)


def _gathered(padding: Tensor, group: dist.ProcessGroup) -> Tensor:
    """bool [b, s] of the parts of all ranks, without gradients."""
    parts = [torch.empty_like(padding) for _ in range(group.size())]
    dist.all_gather(parts, padding.contiguous(), group=group)
    return torch.cat(parts, dim=1)
