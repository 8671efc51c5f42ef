"""What a language model is called with, the same beside a vision tower and alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.models.backends.selection import uses_transformer_engine
from megatron.bridge.models.backends.sequence_parts import SequenceParts
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.packing import Packing
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_checks import (
    IGNORED_LABEL,
    NOT_TAKEN,
    check_positions,
    check_tokens,
    check_values,
    real_tokens,
    refuse_others,
)

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
        packing: where packed sequences are; None for a batch that is not packed.
        context_parts: how context parallelism cuts s; None without it.
        tensor_ranks: the ranks that share this part of s by sequence parallelism; None without it.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    token_types: Tensor | None
    padding: Tensor | None
    packing: Packing | None
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
        packing = None if packed_seq_params is None else Packing.of(packed_seq_params)
        check_tokens(input_ids, token_types)
        real = real_tokens(attention_mask, input_ids)
        position_ids = check_positions(
            position_ids, input_ids, packing, has_pictures=bool(config.placeholders)
        )
        ranks, lengths = config.context_parallel_size, [input_ids.shape[1]]
        if packing is not None:
            if config.scores and not config.scores.each_token:
                raise InputError(
                    "packed_seq_params was given to a classifier of sequences, which scores the "
                    "last token of each row: give the sequences as a padded batch"
                )
            lengths = packing.lengths
            if real is not None or len(input_ids) > 1:
                pack = _Pack(packing, input_ids, real)
                no_picture = next(token for token in count() if token not in config.placeholders)
                input_ids = pack(input_ids, no_picture)
                position_ids = None if position_ids is None else pack(position_ids, 0)
                token_types = None if token_types is None else pack(token_types, 0)
                real = pack.real
            is_part = input_ids.shape[1] * ranks == packing.tokens
            if not is_part and input_ids.shape[1] != packing.tokens:
                raise InputError(
                    f"packed_seq_params covers {packing.tokens} tokens, and input_ids has "
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
        if packing is not None and real is None:
            real = packing.real_tokens(input_ids.device)
        check_values("input_ids", input_ids, config.vocab_size)
        padding = None if real is None or bool(real.all()) else ~real
        tokens = cls(
            input_ids=input_ids,
            position_ids=position_ids,
            token_types=token_types,
            padding=padding,
            packing=packing,
            context_parts=parts,
            tensor_ranks=groups.tp if config.sequence_parallel else None,
        )
        _check_layout(config, tokens, training=training)
        return tokens

    @property
    def boundaries(self) -> Tensor | None:
        """int [sequences + 1], where each sequence of a pack begins, with the padding behind it."""
        return None if self.packing is None else self.packing.boundaries(self.input_ids.device)

    @property
    def attention_mask(self) -> Tensor | None:
        """bool [b, s], True for real tokens; None if all are real, or in a pack, which has none."""
        if self.padding is None or self.packing is not None:
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
        if self.packing is not None:
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
        padding = None if self.packing is not None else self.padding
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
            if labels is None:
                continue
            if list(labels.shape) != expected:
                part = f"of context_parallel_size = {ranks} this rank's part" if ranks > 1 else ""
                raise InputError(
                    f"{name} has shape {list(labels.shape)}, expected {expected}, one for each "
                    f"token that the model returns{part and ': '}{part}"
                )
            if name == "labels":
                check_values(name, labels, config.vocab_size, ignored=IGNORED_LABEL)


def stand_in(
    input_ids: Tensor, attention_mask: Tensor | None, packed_seq_params: PackedSeqParams | None
) -> Tensor:
    """Tokens that fit to the pack or the mask, for a stage that does not read them.

    Those given are kept if they fit. Others are what clients pack, or strip of padding, on the
    first stage alone; they may be nested.
    """
    if attention_mask is not None:
        fits = attention_mask.ndim != 2 or input_ids.shape == attention_mask.shape
        return input_ids if fits else torch.zeros_like(attention_mask, dtype=torch.long)
    if packed_seq_params is None:
        return input_ids
    tokens = Packing.of(packed_seq_params).tokens
    packed = not input_ids.is_nested and len(input_ids) == 1 and tokens % input_ids.shape[1] == 0
    if packed:
        return input_ids
    return torch.zeros(1, tokens, dtype=torch.long, device=input_ids.device)


def gathers_logits(
    config: "QwenModelProvider", labels: Tensor | None, asked: bool | None, trimmed: bool
) -> bool:
    """Whether each tensor-parallel rank gets all logits: a loss needs them split."""
    if labels is not None:
        return False
    return trimmed or (not config.parallel_output if asked is None else asked)


def batch_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a model those that are its batch; those that it refuses are refused."""
    of_output = ("runtime_gather_output", "trim_vocab_padding")
    refuse_others({name: value for name, value in arguments.items() if name in NOT_TAKEN})
    taken = {*of_output, *NOT_TAKEN}
    return {name: value for name, value in arguments.items() if name not in taken}


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
    padded_batch = tokens.padding is not None and tokens.packing is None
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
        packing: of the pack.
        input_ids: [b, s].
        real: bool [b, s]; None if all tokens are real.
    """

    def __init__(self, packing: Packing, input_ids: Tensor, real: Tensor | None) -> None:
        boundaries = packing.boundaries(input_ids.device)
        self.chosen = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
        lengths, room = self.chosen.sum(1), boundaries.diff()
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
        within = (self.chosen.cumsum(1) - 1) + boundaries[:-1, None]
        self.places = within[self.chosen]
        self.tokens = packing.tokens
        self.real = self(self.chosen, False)

    def __call__(self, rows: Tensor, padding: int) -> Tensor:
        """[..., b, s] -> [..., 1, t], padding behind each sequence."""
        packed = rows.new_full((*rows.shape[:-2], 1, self.tokens), padding)
        packed[..., 0, self.places] = rows[..., self.chosen]
        return packed
