"""What a batch of tokens must be before anything is made of it, the same on every rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.packing import Packing
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_index import IMAGE, TEXT, VIDEO

IGNORED_LABEL = -100
"""Of a token that has no loss."""

NOT_TAKEN = {
    "decoder_input": "embeddings are made of input_ids",
    "extra_block_kwargs": "the layers take nothing further",
    "inference_context": "this model keeps no state from call to call",
    "inference_params": "this model keeps no state from call to call",
    "output_processor": "make of the logits what you need",
    "output_processor_context": "make of the logits what you need",
    "padding_mask": "attention_mask says where padding is",
}
"""Arguments of megatron-core's GPTModel that may be None: why any other value is refused."""


def refuse_others(given: Mapping[str, Any]) -> None:
    """Refuse what GPTModel takes and these models do not, unless it is None.

    Raises:
        TypeError: GPTModel has no argument of a name, either.
        InputError: one is given.
    """
    for name, value in given.items():
        if name not in NOT_TAKEN:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if value is not None:
            raise InputError(f"{name} was given: {NOT_TAKEN[name]}, leave it out")


def check_tokens(input_ids: Any, token_types: Tensor | None) -> None:
    """Raise InputError unless `input_ids` are [b, s], and `token_types` say what each one is."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        found = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            found = f"of shape {list(input_ids.shape)}"
        raise InputError(
            f"input_ids is {found}, expected a tensor of token ids [b, s], with one token at least"
        )
    if token_types is None:
        return
    if token_types.shape != input_ids.shape:
        raise InputError(
            f"mm_token_type_ids has shape {list(token_types.shape)}, expected "
            f"{list(input_ids.shape)} like input_ids; None takes them from input_ids"
        )
    _check_range("mm_token_type_ids", token_types, max(TEXT, IMAGE, VIDEO) + 1)


def check_values(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Refuse tokens that are not of the vocabulary.

    An embedding that is split over ranks takes no notice of another token, and a loss neither.

    Args:
        name: of the argument.
        ids: the tokens.
        vocab_size: how many there are, without padding.
        ignored: may stand for none.

    Raises:
        InputError: one is not.
    """
    also = "" if ignored is None else f", or {ignored} for a token without a loss"
    _check_range(
        name, ids if ignored is None else ids.masked_fill(ids == ignored, 0), vocab_size, also
    )


def _check_range(name: str, ids: Tensor, end: int, also: str = "") -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{name} is {ids.dtype}, expected integers")
    least, most = torch.stack(ids.aminmax()).tolist()
    if least < 0 or most >= end:
        found = least if least < 0 else most
        raise InputError(f"{name} has {found}: expected 0 to {end - 1}{also}")


def real_tokens(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """bool [b, s], True for real tokens; None if there is no mask.

    Raises:
        InputError: the mask is neither [b, s] nor bool [b, 1, 1, s].
    """
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


def check_positions(
    position_ids: Tensor | None, input_ids: Tensor, packing: Packing | None, *, has_pictures: bool
) -> Tensor | None:
    """The positions if they are of these tokens; None for those that the tokens have anyway.

    Of a pack, clients give those of its rows before they were packed. They are what the tokens have
    if each row counts from 0.

    Raises:
        InputError: they are of other tokens.
    """
    if position_ids is None:
        return None
    found, one_each = list(position_ids.shape), list(input_ids.shape)
    three_each = [3, *one_each]
    if found == one_each or (has_pictures and found == three_each):
        return position_ids
    if packing is not None and len(input_ids) == 1 and found[:-1] == [len(packing.lengths)]:
        steps = position_ids.diff(dim=1)
        counts = (position_ids[:, 0] == 0).all() & ((steps == 0) | (steps == 1)).all()
        if bool(counts) and not has_pictures:
            return None
    expected = f"{one_each} like input_ids"
    if has_pictures:
        expected = f"{three_each}, temporal, height and width, or {one_each} for text alone"
    elif packing is not None:
        expected += ", or None, which counts each sequence from 0"
    raise InputError(f"position_ids has shape {found}, expected {expected}")
