"""What a language model is called with, the same beside a vision tower and alone."""

from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.bridge.errors import InputError

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider


def check_text(
    config: "QwenModelProvider",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
    *,
    training: bool,
) -> None:
    """Refuse inputs that contradict each other, on every pipeline stage alike.

    Args:
        config: the provider.
        input_ids: [b, s].
        attention_mask: [b, s], nonzero for real tokens; None if all are real.
        labels: None if there are none.
        packed_seq_params: where packed sequences begin; None for a batch that is not packed.
        training: whether the model trains.

    Raises:
        InputError: a classifier is given labels, the shapes do not fit together, a packed batch is
            not [1, tokens] without a mask or is given to a classifier of sequences, nothing tells
            such a classifier where sequences end, sequence parallelism cannot split s, or the
            layout is not for training.
    """
    if labels is not None and config.scores is not None:
        raise InputError(
            "labels were given to a classifier: compute the loss of its scores, which are "
            "what it returns without labels"
        )
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected "
            f"{[batch, length]} with 1 for real tokens"
        )
    if packed_seq_params is not None and (batch != 1 or attention_mask is not None):
        raise InputError(
            f"packed_seq_params was given with input_ids of shape {[batch, length]} and "
            f"attention_mask {'None' if attention_mask is None else 'set'}: a packed batch is "
            f"[1, tokens], without a mask"
        )
    if packed_seq_params is not None and config.scores and not config.scores.each_token:
        raise InputError(
            "packed_seq_params was given to a classifier of sequences, which scores the last token "
            "of each row: give the sequences as a padded batch"
        )
    scores = config.scores
    if batch > 1 and scores and not scores.each_token and scores.pad_token_id is None:
        raise InputError(
            f"input_ids has {batch} sequences, and the config has no pad_token_id to tell "
            f"where each of them ends: set scores.pad_token_id, or give them one by one"
        )
    ranks = config.tensor_model_parallel_size
    if config.sequence_parallel and length % ranks:
        raise InputError(
            f"the sequence length {length} is not a multiple of "
            f"tensor_model_parallel_size = {ranks}, which sequence_parallel needs. Pad the "
            f"batch on the right."
        )
    # megatron-core says so, too, where a layer has experts: other stages would wait.
    if training and config.num_moe_experts and ranks > 1 and not config.sequence_parallel:
        raise InputError(
            f"sequence_parallel is False with tensor_model_parallel_size = {ranks} and experts: "
            f"megatron-core trains experts with sequence_parallel=True only. Set it before the "
            f"model is built."
        )


def packed_boundaries(packed_seq_params: PackedSeqParams) -> Tensor:
    """int [sequences + 1], where each sequence of a pack begins, padding between them included."""
    padded: Tensor | None = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def masks(
    config: "QwenModelProvider", group: dist.ProcessGroup, attention_mask: Tensor | None
) -> dict[str, Tensor | None]:
    """The masks of GPTModel: of attention, and of what the balance of the experts does not count.

    Args:
        config: the provider.
        group: the tensor-parallel ranks.
        attention_mask: [b, s], nonzero for real tokens; None if all are real.

    Returns:
        attention_mask: bool [b, 1, 1, s], True for padding; None if there is none.
        padding_mask: bool [b, s], this rank's part of s; None also for a model without experts.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return {"attention_mask": None, "padding_mask": None}
    padding = ~attention_mask.bool()
    of_experts = None if config.num_moe_experts is None else padding
    if of_experts is not None and config.sequence_parallel:
        of_experts = padding.chunk(group.size(), dim=1)[group.rank()]
    return {"attention_mask": padding[:, None, None, :], "padding_mask": of_experts}
