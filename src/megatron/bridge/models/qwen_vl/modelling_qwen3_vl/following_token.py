"""Multi-token prediction: what follows each token, pictures and padding included."""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_model import Qwen3VLTextModel


class FollowingTokens:
    """Stands for the embedding of megatron-core's MultiTokenPredictionLayer in one forward pass.

    The layer shifts the tokens by one and embeds them. For the placeholder of a visual feature
    that would be the wrong vector, so this shifts the embeddings of the whole prompt, which have
    the features in place. The n-th call is for the n-th predictor and shifts by n. What the last
    token of a sequence is followed by means nothing: no label depends on it.

    Args:
        model: the language model.
        embeddings: [s, b, h], with sequence parallelism this rank's part of s.
        padding: bool [b, s], True for padding, all of s; None if there is none.
    """

    def __init__(
        self, model: "Qwen3VLTextModel", embeddings: Tensor, padding: Tensor | None
    ) -> None:
        self.model = model
        self.sequence_parallel = model.config.sequence_parallel
        self.following = embeddings
        self.padding = padding
        if self.sequence_parallel:
            # What follows it is the same on every rank, so the gradient is not summed.
            self.following = tensor_parallel.gather_from_sequence_parallel_region(
                embeddings, tensor_parallel_output_grad=False, group=model.pg_collection.tp
            )

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embeddings of the tokens that follow.

        Args:
            input_ids: not used.
            position_ids: not used.

        Returns:
            [s, b, h], with sequence parallelism this rank's part of s.
        """
        self.following = embeddings = torch.roll(self.following, -1, dims=0)
        if self.padding is not None:
            self.padding = torch.roll(self.padding, -1, dims=1)
        if self.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(
                embeddings, self.model.pg_collection.tp
            )
        return embeddings

    def padding_mask(self) -> Tensor | None:
        """True where padding follows, [b, this rank's part of s]: there is nothing to predict."""
        if self.padding is None or not self.sequence_parallel:
            return self.padding
        group = self.model.pg_collection.tp
        return self.padding.chunk(group.size(), dim=1)[group.rank()]


class FollowingTokenPredictor(MultiTokenPredictionLayer):
    """A predictor whose padding is shifted as a whole.

    megatron-core shifts each rank's part of the padding, which loses one token per rank.
    """

    def _get_embeddings(
        self, *, embedding: FollowingTokens, padding_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        tokens, positions, _, embeddings, hidden_states = super()._get_embeddings(
            embedding=embedding, padding_mask=None, **given
        )
        return tokens, positions, embedding.padding_mask(), embeddings, hidden_states
