"""The head of a classifier, in the place of the output layer."""

from typing import TYPE_CHECKING

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider


class ScoreHead(nn.Linear):
    """Scores of hidden states, the same on every tensor-parallel rank.

    Args:
        config: the provider, with `scores`.
        groups: process groups.
    """

    def __init__(self, config: "QwenModelProvider", groups: ProcessGroupCollection) -> None:
        if config.scores is None:
            raise ValueError("the provider has no scores")
        self.scores = config.scores
        super().__init__(
            config.hidden_size, self.scores.labels, self.scores.bias, dtype=config.params_dtype
        )
        if config.perform_initialization:
            config.init_method(self.weight)
        self.group = groups.tp if config.sequence_parallel else None
        self.dropout = nn.Dropout(self.scores.dropout)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_ids: Tensor
    ) -> Tensor:
        """Score hidden states as transformers' classifiers do.

        Args:
            hidden_states: [s, b, h], with sequence parallelism this rank's part of s.
            input_ids: [b, s].

        Returns:
            [b, s, labels] for each token, or [b, labels] for each sequence: those of its last
            token that is not padding.
        """
        if self.group is not None:
            # Every rank scores all tokens, so the gradient is not summed.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.group
            )
        logits = super().forward(self.dropout(hidden_states.transpose(0, 1)))
        if self.scores.each_token:
            return logits
        return logits[torch.arange(len(logits), device=logits.device), self._last(input_ids)]

    def _last(self, input_ids: Tensor) -> Tensor:
        """int64 [b], where the last token of each sequence is."""
        batch, length = input_ids.shape
        padding = self.scores.pad_token_id
        if padding is None:
            return torch.full((batch,), length - 1, device=input_ids.device)
        real = (input_ids != padding).long()
        return (torch.arange(length, device=input_ids.device) * real).argmax(-1)
