"""Microbatches for every layout, and the part of each that a context-parallel rank has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from oracle import tiny

type Batch = dict[str, Any]
type Cut = Callable[[Tensor], Tensor]

LENGTH = 112
TEXT_LENGTH = 24


def batches_of(kind: str, *, of_text: bool) -> list[Batch]:
    """Four microbatches with labels; see Layout.batches."""
    if of_text:
        return text_batches()
    batches: list[Batch] = padded_batches()
    if kind == "packed":
        return [packed(one, by_the_model=index < 1) for index, one in enumerate(batches)]
    return batches


def padded_batches() -> list[Batch]:
    """Pictures on all of two context-parallel ranks; none; a video; one on a single rank."""
    processor = tiny.build_processor()
    [china, flower] = [one.resize((160, 128)) for one in tiny.photographs()]
    prompts: list[tuple[list[str], dict[str, Any]]] = [
        (
            [f"Of this one {tiny.IMAGE} and", f"See {tiny.IMAGE} now"],
            {"images": [china, flower]},
        ),
        (["No picture at all", "here."], {}),
        (["Short.", f"A film {tiny.VIDEO}"], {"videos": [tiny.video()]}),
        (["Only words, and of these a few.", f"{tiny.IMAGE}!"], {"images": [flower]}),
    ]
    found = [
        tiny.prompt(
            processor, text, **media, padding="max_length", max_length=LENGTH, padding_side="right"
        )
        for text, media in prompts
    ]
    for one in found:
        labels = one["input_ids"].roll(-1, dims=1)
        labels[(one["mm_token_type_ids"] != 0) | (one["attention_mask"] == 0)] = -100
        one["labels"] = labels
    return found


def text_batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for padding, on_the_left in ((5, 0), (0, 0), (1, 7), (9, 4)):
        ids = torch.randint(6, 300, (2, TEXT_LENGTH), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, TEXT_LENGTH - padding :] = 0
        mask[0, :on_the_left] = 0
        labels = ids.roll(-1, 1).masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def without_labels(batches: list[Batch]) -> list[Batch]:
    return [{key: one[key] for key in one if key != "labels"} for one in batches]


class Pack:
    """Where the rows of a batch go in a pack in which each is filled up to a multiple of 16."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.lengths = (-(-self.mask.sum(1) // 16) * 16).tolist()

    def __call__(self, rows: Tensor, fill: int = 0) -> Tensor:
        parts = [row[real] for row, real in zip(rows, self.mask, strict=True)]
        filled = []
        for part, length in zip(parts, self.lengths, strict=True):
            rest = part.new_full((length - len(part), *part.shape[1:]), fill)
            filled.append(torch.cat([part, rest]))
        return torch.cat(filled)[None]

    @property
    def params(self) -> PackedSeqParams:
        boundaries = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int()
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            cu_seqlens_q_padded=boundaries,
            cu_seqlens_kv_padded=boundaries,
            max_seqlen_q=max(self.lengths),
            max_seqlen_kv=max(self.lengths),
        )


def packed(batch: Batch, *, by_the_model: bool) -> Batch:
    """The rows as they are, to be packed by the model; or packed already."""
    pack = Pack(batch["attention_mask"])
    found = batch | {"packed_seq_params": pack.params, "labels": pack(batch["labels"], -100)}
    if by_the_model:
        return found
    del found["attention_mask"]
    names = ("input_ids", "mm_token_type_ids")
    return found | {name: pack(batch[name]) for name in names}


def cut(whole: Tensor, dim: int, lengths: list[int], ranks: int, rank: int) -> Tensor:
    """Of each of the sequences, chunks r and 2n - 1 - r."""
    if ranks == 1:
        return whole
    parts = []
    for sequence in whole.split(lengths, dim):
        chunks = sequence.chunk(2 * ranks, dim)
        parts += [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(parts, dim)


def of_rank(batch: Batch, ranks: int, rank: int, *, with_inputs: bool) -> tuple[Batch, Cut]:
    """A batch with the labels that a context-parallel rank gets, and how tensors are cut so.

    Args:
        batch: of the whole sequences.
        ranks: of context parallelism.
        rank: of them.
        with_inputs: what the model reads is cut as well.
    """
    lengths = [batch["labels"].shape[1]]
    if (packing := batch.get("packed_seq_params")) is not None:
        lengths = packing.cu_seqlens_q.diff().tolist()

    def part(whole: Tensor) -> Tensor:
        return cut(whole, 1, lengths, ranks, rank)

    names = ["labels"]
    if with_inputs:
        names += ["input_ids", "attention_mask", "mm_token_type_ids"]
    return batch | {name: part(batch[name]) for name in names if name in batch}, part
