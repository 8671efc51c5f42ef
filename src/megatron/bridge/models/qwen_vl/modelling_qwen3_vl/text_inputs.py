"""What a language model is called with, the same beside a vision tower and alone."""

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.models.backends.selection import uses_transformer_engine
from megatron.bridge.models.backends.sequence_parts import SequenceParts

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider


@dataclass(frozen=True)
class TextInputs:
    """The tokens of a batch as the layers take them.

    Attributes:
        input_ids: [b, s]; of a packed batch [1, t].
        position_ids: [..., b, s] as given; None for those that the tokens have.
        token_types: [b, s] as given, 0 for text; None for those that `input_ids` tell.
        padding: bool [b, s], True for padding; None if there is none.
        packed_seq_params: where packed sequences begin; None for a batch that is not packed.
        context_parts: how context parallelism cuts s; None without it.
        tensor_ranks: the ranks that share this part of s by sequence parallelism; None without it.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    token_types: Tensor | None
    padding: Tensor | None
    packed_seq_params: PackedSeqParams | None
    context_parts: SequenceParts | None
    tensor_ranks: dist.ProcessGroup | None

    @classmethod
    def of(
        cls,
        config: "QwenModelProvider",
        groups: ProcessGroupCollection,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        token_types: Tensor | None = None,
        is_part: bool,
        training: bool,
    ) -> Self:
        """Take what a model is called with; rows with `packed_seq_params` are packed here.

        What contradicts itself is refused on every pipeline stage alike.

        Args:
            config: the provider.
            groups: process groups.
            input_ids: [b, s].
            position_ids: [b, s] or [3, b, s]; None computes them.
            attention_mask: [b, s], nonzero for real tokens; or bool [b, 1, 1, s], True for padding;
                None if all are real.
            packed_seq_params: where packed sequences begin; None for a batch that is not packed.
                Without a mask one row is packed already. With one, or with several rows, each row
                is a sequence, whose real tokens come first in its place in the pack.
            token_types: [b, s]; None if they are not given.
            is_part: with context parallelism s is this rank's part, and is put together here. Of a
                pack its length tells.
            training: whether the model trains.

        Raises:
            InputError: the shapes do not fit together, rows do not fit into the pack, a classifier
                of sequences is given a packed batch, or is not told where sequences end, sequence
                or context parallelism cannot split s, or the layout is not for training.
        """
        real = _real_tokens(attention_mask, input_ids)
        _check_positions(position_ids, input_ids, has_pictures=bool(config.placeholders))
        ranks, lengths = config.context_parallel_size, [input_ids.shape[1]]
        if packed_seq_params is not None:
            if config.scores and not config.scores.each_token:
                raise InputError(
                    "packed_seq_params was given to a classifier of sequences, which scores the "
                    "last token of each row: give the sequences as a padded batch"
                )
            if real is not None or len(input_ids) > 1:
                pack = _Pack(packed_seq_params, input_ids, real)
                no_picture = next(token for token in count() if token not in config.placeholders)
                input_ids = pack(input_ids, no_picture)
                position_ids = None if position_ids is None else pack(position_ids, 0)
                token_types = None if token_types is None else pack(token_types, 0)
                real = pack.real
            lengths = packed_boundaries(packed_seq_params).diff().tolist()
            is_part = input_ids.shape[1] * ranks == sum(lengths)
            if not is_part and input_ids.shape[1] != sum(lengths):
                raise InputError(
                    f"packed_seq_params covers {sum(lengths)} tokens, and input_ids has "
                    f"{input_ids.shape[1]}"
                )
        elif is_part:
            lengths = [length * ranks for length in lengths]
        parts = SequenceParts(groups.cp, lengths) if ranks > 1 else None
        if parts is not None and is_part:
            input_ids = parts.gather(input_ids, -1)
            position_ids = None if position_ids is None else parts.gather(position_ids, -1)
            token_types = None if token_types is None else parts.gather(token_types, -1)
            real = None if real is None else parts.gather(real.int(), -1).bool()
        padding = None if real is None or bool(real.all()) else ~real
        tokens = cls(
            input_ids=input_ids,
            position_ids=position_ids,
            token_types=token_types,
            padding=padding,
            packed_seq_params=packed_seq_params,
            context_parts=parts,
            tensor_ranks=groups.tp if config.sequence_parallel else None,
        )
        _check_layout(config, tokens, training=training)
        return tokens

    @property
    def boundaries(self) -> Tensor | None:
        """int [sequences + 1], where each sequence of a pack begins, with the padding behind it."""
        return None if self.packed_seq_params is None else packed_boundaries(self.packed_seq_params)

    @property
    def attention_mask(self) -> Tensor | None:
        """bool [b, s], True for real tokens; None if all are real, or in a pack, which has none."""
        if self.padding is None or self.packed_seq_params is not None:
            return None
        return ~self.padding

    def of_context(self, whole: Tensor, dim: int = 0) -> Tensor:
        """Of something with the whole sequence, the part that context parallelism gives a rank."""
        return whole if self.context_parts is None else self.context_parts.cut(whole, dim)

    def of_rank(self, whole: Tensor) -> Tensor:
        """This rank's part [s, ...] of something that has the whole sequence first."""
        part = self.of_context(whole)
        if self.tensor_ranks is None:
            return part
        return tensor_parallel.scatter_to_sequence_parallel_region(part, self.tensor_ranks)

    def angles_of(self, position_ids: Tensor) -> Tensor:
        """The positions whose angles megatron-core's attention takes, of [..., s].

        Those of a pack it cuts itself.
        """
        if self.packed_seq_params is not None:
            return position_ids
        return self.of_context(position_ids, -1)

    def masks(self, config: "QwenModelProvider") -> dict[str, Tensor | None]:
        """The masks of GPTModel: of attention, and of what the balance of experts does not count.

        Returns:
            attention_mask: bool [b, 1, 1, s], True for padding; None if there is none.
            padding_mask: bool [b, s], this rank's part of s; None also for a model without experts.
        """
        of_experts = None if config.num_moe_experts is None else self.padding
        if of_experts is not None:
            of_experts = self.of_context(of_experts, 1)
            if (group := self.tensor_ranks) is not None:
                of_experts = of_experts.chunk(group.size(), dim=1)[group.rank()]
        padding = None if self.packed_seq_params is not None else self.padding
        return {
            "attention_mask": None if padding is None else padding[:, None, None, :],
            "padding_mask": of_experts,
        }

    def check_labels(self, config: "QwenModelProvider", **given: Tensor | None) -> None:
        """Raise InputError unless labels, by name, are one for each token, or None."""
        if config.scores is not None and given["labels"] is not None:
            raise InputError(
                "labels were given to a classifier: compute the loss of its scores, which are "
                "what it returns without labels"
            )
        batch, length = self.input_ids.shape
        ranks = config.context_parallel_size
        expected = [batch, length // ranks]
        for name, labels in given.items():
            if labels is not None and list(labels.shape) != expected:
                part = f"of context_parallel_size = {ranks} this rank's part" if ranks > 1 else ""
                raise InputError(
                    f"{name} has shape {list(labels.shape)}, expected {expected}, one for each "
                    f"token that the model returns{part and ': '}{part}"
                )


def packed_boundaries(packed_seq_params: PackedSeqParams) -> Tensor:
    """int [sequences + 1], where each sequence of a pack begins, padding between them included."""
    padded: Tensor | None = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def _real_tokens(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """bool [b, s], True for real tokens; None if there is no mask."""
    if attention_mask is None:
        return None
    batch, length = input_ids.shape
    if attention_mask.dtype == torch.bool and attention_mask.shape == (batch, 1, 1, length):
        return ~attention_mask[:, 0, 0, :]
    if attention_mask.shape != (batch, length):
        raise InputError(
            f"attention_mask is {attention_mask.dtype} of shape {list(attention_mask.shape)}, "
            f"expected {[batch, length]} with 1 for real tokens, or torch.bool of shape "
            f"{[batch, 1, 1, length]} with True for padding"
        )
    return attention_mask.bool()


def _check_positions(position_ids: Tensor | None, input_ids: Tensor, *, has_pictures: bool) -> None:
    if position_ids is None:
        return
    found, one_each = list(position_ids.shape), list(input_ids.shape)
    three_each = [3, *one_each]
    if found != one_each and not (has_pictures and found == three_each):
        expected = f"{one_each} like input_ids"
        if has_pictures:
            expected = f"{three_each}, temporal, height and width, or {one_each} for text alone"
        raise InputError(f"position_ids has shape {found}, expected {expected}")


def _check_layout(config: "QwenModelProvider", tokens: TextInputs, *, training: bool) -> None:
    """Refuse a batch that the model's layout or head is not for."""
    batch, length = tokens.input_ids.shape
    scores = config.scores
    if batch > 1 and scores and not scores.each_token and scores.pad_token_id is None:
        raise InputError(
            f"input_ids has {batch} sequences, and the config has no pad_token_id to tell "
            f"where each of them ends: set scores.pad_token_id, or give them one by one"
        )
    ranks, parts = config.tensor_model_parallel_size, config.context_parallel_size
    if config.sequence_parallel and length // parts % ranks:
        of_context = f" / context_parallel_size = {parts}" if parts > 1 else ""
        raise InputError(
            f"the sequence length {length}{of_context} is not a multiple of "
            f"tensor_model_parallel_size = {ranks}, which sequence_parallel needs. Pad the "
            f"batch on the right."
        )
    padded_batch = tokens.padding is not None and tokens.packed_seq_params is None
    if parts > 1 and padded_batch and uses_transformer_engine(config.transformer_impl):
        raise InputError(
            f"attention_mask has padding, and TransformerEngine's attention with "
            f"context_parallel_size = {parts} takes none: pass packed_seq_params as well, and the "
            f"rows are packed, or set transformer_impl='local'"
        )
    # megatron-core says so, too, where a layer has experts: other stages would wait.
    if training and config.num_moe_experts and ranks > 1 and not config.sequence_parallel:
        raise InputError(
            f"sequence_parallel is False with tensor_model_parallel_size = {ranks} and experts: "
            f"megatron-core trains experts with sequence_parallel=True only. Set it before the "
            f"model is built."
        )


class _Pack:
    """Moves the rows of a batch, each with its padding, to their places in a pack.

    Args:
        packed_seq_params: of the pack.
        input_ids: [b, s].
        real: bool [b, s]; None if all tokens are real.
    """

    def __init__(
        self, packed_seq_params: PackedSeqParams, input_ids: Tensor, real: Tensor | None
    ) -> None:
        boundaries = packed_boundaries(packed_seq_params)
        self.chosen = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
        lengths, room = self.chosen.sum(1), boundaries.diff().to(input_ids.device)
        if len(room) != len(lengths):
            raise InputError(
                f"packed_seq_params has {len(room)} sequences, and input_ids {len(lengths)} rows: "
                f"with an attention_mask or several rows each row is a sequence. One row of "
                f"packed sequences is given without a mask."
            )
        if bool((lengths > room).any()):
            raise InputError(
                f"the rows of input_ids have {lengths.tolist()} real tokens, and their sequences "
                f"in packed_seq_params {room.tolist()}: cut them to the same lengths"
            )
        within = (self.chosen.cumsum(1) - 1) + boundaries[:-1, None].to(input_ids.device)
        self.places = within[self.chosen]
        self.tokens = int(boundaries[-1])
        self.real = self(self.chosen, False)

    def __call__(self, rows: Tensor, padding: int) -> Tensor:
        """[..., b, s] -> [..., 1, t], padding behind each sequence."""
        packed = rows.new_full((*rows.shape[:-2], 1, self.tokens), padding)
        packed[..., 0, self.places] = rows[..., self.chosen]
        return packed
