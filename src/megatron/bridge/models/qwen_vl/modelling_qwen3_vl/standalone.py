"""A language model of text as a model of its own, with the names of a GPTModel."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.bridge.models.model_copy import deep_copy
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_checks import refuse_others
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_inputs import (
    TextInputs,
    batch_of,
    gathers_logits,
    stand_in,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_model import Qwen3VLTextModel
from megatron.bridge.runtime.cpu import megatron_on_cpu


class QwenModel(Qwen3VLTextModel):
    """One pipeline stage of a Qwen model of text; made like Qwen3VLTextModel."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "QwenModel":
        """A model of its own on the same process groups; see `deep_copy`."""
        return deep_copy(self, memo)

    def forward(  # type: ignore[override]  # called like Qwen3VLModel
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        *,
        runtime_gather_output: bool | None = None,
        trim_vocab_padding: bool = False,
        **others: None,
    ) -> Tensor:
        """Run this pipeline stage.

        Args:
            input_ids: int64 [b, s]; packed sequences are [1, t], or rows that are packed here. With
                context parallelism this rank's part, as GPTModel takes it and megatron-core's
                get_batch_on_this_cp_rank cuts it: also positions, masks and labels. Rows that are
                packed here, and packed sequences if they are, are whole. A stage that has no use
                for tokens takes any in the place of those of a pack, or of a mask: clients prepare
                them on the first stage alone.
            position_ids: int64 [b, s]; None counts from 0 in each sequence, padding included,
                as transformers does.
            attention_mask: bool or int [b, s], nonzero for real tokens, padding on either side; or
                bool [b, 1, 1, s], True for padding; None if all are real.
            labels: int64 [b, s], already shifted: the token that follows. -100 has no loss.
            loss_mask: [b, s], for multi-token prediction, as in Qwen3VLModel.
            packed_seq_params: "thd" packing, sequences do not see each other.
            runtime_gather_output: as in Qwen3VLModel.
            trim_vocab_padding: as in Qwen3VLModel.
            **others: further arguments of megatron-core's GPTModel, all of them None.

        Returns:
            Last stage: logits [b, s, vocabulary], as of Qwen3VLModel; with labels the loss per
            token, fp32 [b, s]; of a classifier the scores, [b, labels] or [b, s, labels]. Other
            stages: hidden states [s, b, h].

        Raises:
            InputError: inputs that contradict each other, with both numbers.
        """
        refuse_others(others)
        tokens = self._inputs(
            input_ids, position_ids, attention_mask, labels, loss_mask, packed_seq_params
        )
        embeds = self.pre_process or self.mtp_process  # predictors look at the tokens, too
        with megatron_on_cpu():
            positions = tokens.position_ids
            if positions is None:
                positions = _positions(tokens)
            output: Tensor = super().forward(
                input_ids=tokens.of_context(tokens.input_ids, 1),
                position_ids=tokens.angles_of(positions.expand(3, *tokens.input_ids.shape)),
                **tokens.masks(self.config),
                decoder_input=self._embed(tokens) if embeds else None,
                labels=labels,
                loss_mask=loss_mask,
                packed_seq_params=packed_seq_params,
                runtime_gather_output=gathers_logits(
                    self.config, labels, runtime_gather_output, trim_vocab_padding
                ),
            )
        if trim_vocab_padding and self.post_process and labels is None:
            return output[..., : self.config.vocab_size]
        return output

    def check_inputs(self, **batch: Any) -> None:
        """Refuse what `forward` would refuse; see `Qwen3VLModel.check_inputs`.

        Args:
            batch: arguments of `forward`, by name.

        Raises:
            InputError: as `forward`.
        """
        self._inputs(**batch_of(batch))

    def _inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> TextInputs:
        tokens = TextInputs.of(
            self.config,
            self.pg_collection,
            input_ids
            if self._reads_tokens
            else stand_in(input_ids, attention_mask, packed_seq_params),
            position_ids=position_ids,
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
            is_part=True,
            training=self.training,
        )
        tokens.check_labels(self.config, labels=labels, loss_mask=loss_mask)
        return tokens

    @property
    def _reads_tokens(self) -> bool:
        """Whether this stage embeds tokens, predicts from them, or looks for the last one."""
        looks = self.post_process and self.config.scores is not None
        return bool(self.pre_process or self.mtp_process or looks)

    def _embed(self, tokens: TextInputs) -> Tensor:
        """Embeddings [s, b, h], this rank's part of the sequence."""
        return tokens.of_rank(self.embedding(input_ids=tokens.input_ids, position_ids=None))


def _positions(tokens: TextInputs) -> Tensor:
    """[1, s], each sequence from 0."""
    device = tokens.input_ids.device
    if (boundaries := tokens.boundaries) is None:
        return torch.arange(tokens.input_ids.shape[1], device=device)[None]
    lengths = boundaries.diff().tolist()
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]
