"""Packed sequences and bf16."""

from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron.bridge.errors import InputError
from oracle import tiny
from oracle.test_gradients import assert_equal_gradients, labels_of


def packed(prompts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The prompts one after the other in one row."""
    lengths = torch.tensor([prompt["input_ids"].shape[1] for prompt in prompts])
    boundaries = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    visual = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    inputs: dict[str, Any] = {
        name: torch.cat([prompt[name] for prompt in prompts if name in prompt])
        for name in visual
        if any(name in prompt for prompt in prompts)
    }
    inputs["input_ids"] = torch.cat([prompt["input_ids"] for prompt in prompts], dim=1)
    inputs["packed_seq_params"] = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return inputs


def test_packed_sequences_equal_each_alone(pair: SimpleNamespace, processor: Any) -> None:
    china, flower = tiny.photographs()
    prompts = [
        tiny.prompt(processor, f"{tiny.IMAGE} What is it?", images=[china]),
        tiny.prompt(processor, "Only words."),
        tiny.prompt(processor, f"Frames {tiny.VIDEO}", videos=[tiny.video()]),
        tiny.prompt(processor, f"And {tiny.IMAGE} this?", images=[flower]),
    ]
    with torch.no_grad():
        found = pair.ours(**packed(prompts), trim_vocab_padding=True)
        expected = torch.cat([pair.hf(**prompt).logits for prompt in prompts], dim=1)
    assert (found - expected).abs().max() <= 1e-4


def batch_of_rows(processor: Any, padding_side: str = "right") -> dict[str, Tensor]:
    """Three rows of different lengths; the second has no picture."""
    return tiny.prompt(
        processor,
        [f"{tiny.IMAGE} What is it?", "Only words.", f"And {tiny.IMAGE} this one, over there?"],
        images=tiny.photographs(),
        padding=True,
        padding_side=padding_side,
    )


def packed_by_the_model(
    inputs: dict[str, Tensor], labels: Tensor, multiple: int = 4, *, tells_padding: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """The rows as they are and where they are to go, as clients pass them; and packed labels."""
    real = inputs["attention_mask"].bool()
    lengths = real.sum(1)
    room = -(-lengths // multiple) * multiple
    boundaries = F.pad(room.cumsum(0), (1, 0)).int()
    without = F.pad(lengths.cumsum(0), (1, 0)).int()
    given = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=without if tells_padding else boundaries,
        cu_seqlens_kv=without if tells_padding else boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=int(room.max()),
        max_seqlen_kv=int(room.max()),
    )
    rows = [
        F.pad(row[there], (0, int(free)), value=-100)
        for row, there, free in zip(labels, real, room - lengths, strict=True)
    ]
    return inputs | {"packed_seq_params": given}, torch.cat(rows)[None]


@pytest.mark.parametrize("case", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe-2x_value_heads"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_rows_that_the_model_packs(
    build: Any, processor: Any, case: str, padding_side: str
) -> None:
    """Loss and every gradient, those of the vision encoder among them, are those of the batch."""
    ours = build(fields={"moe_aux_loss_coeff": 0.0} if "moe" in case else {}, case=case).ours
    inputs = batch_of_rows(processor, padding_side)
    labels = labels_of(inputs).masked_fill(inputs["attention_mask"] == 0, -100)
    rows, packed_labels = packed_by_the_model(inputs, labels)
    losses, gradients = [], []
    for given, wanted in ((inputs, labels), (rows, packed_labels)):
        ours.train().zero_grad()
        loss = ours(**given, labels=wanted)
        assert loss.shape == wanted.shape
        loss.sum().backward()
        losses.append(loss.detach()[wanted != -100])
        gradients.append({name: one.grad.clone() for name, one in ours.named_parameters()})
    assert len(losses[0]) > 40
    assert (losses[0] - losses[1]).abs().max() <= 1e-4
    assert_equal_gradients(gradients[1], gradients[0])


def test_the_balance_of_experts_does_not_count_the_padding_of_a_pack(
    build: Any, processor: Any
) -> None:
    ours = build(fields={"moe_aux_loss_coeff": 10.0}, case="qwen3_vl_moe").ours.train()
    inputs = batch_of_rows(processor)
    real = inputs["attention_mask"].bool()
    found = []
    for multiple in (1, 16, 0):
        rows, labels = packed_by_the_model(
            inputs, labels_of(inputs), multiple or 16, tells_padding=not multiple
        )
        if not multiple:  # packed already: only the boundaries tell what is padding
            ends = rows["packed_seq_params"].cu_seqlens_q_padded.diff().tolist()
            for name in ("input_ids", "mm_token_type_ids"):
                parts = [row[one] for row, one in zip(rows[name], real, strict=True)]
                parts = [
                    F.pad(one, (0, end - len(one))) for one, end in zip(parts, ends, strict=True)
                ]
                rows[name] = torch.cat(parts)[None]
            del rows["attention_mask"]
        ours.zero_grad()
        ours(**rows, labels=labels).sum().backward()
        found.append({name: one.grad.clone() for name, one in ours.named_parameters()})
    assert_equal_gradients(found[1], found[0])
    assert_equal_gradients(found[2], found[0])


def test_rows_that_do_not_fit(build: Any, processor: Any) -> None:
    ours = build().ours
    inputs = batch_of_rows(processor)
    rows, labels = packed_by_the_model(inputs, labels_of(inputs))
    one_row = {"input_ids": rows["input_ids"][:1], "attention_mask": rows["attention_mask"][:1]}
    with pytest.raises(InputError, match="has 3 sequences, and input_ids 1 rows"):
        ours(**one_row, packed_seq_params=rows["packed_seq_params"])
    with pytest.raises(InputError, match="cut them to the same lengths"):
        ours(**rows | {"attention_mask": torch.ones_like(rows["input_ids"])})
    with pytest.raises(InputError, match=r"labels has shape \[1, \d+\], expected \[1, \d+\]"):
        ours(**rows, labels=labels[:, 1:])


def test_masks_and_positions_in_other_shapes(pair: SimpleNamespace, processor: Any) -> None:
    """A mask [b, 1, 1, s] that is True for padding, and one position per token of text."""
    inputs = batch_of_rows(processor)
    padding = ~inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = pair.ours(**inputs)[~padding]
        found = pair.ours(**inputs | {"attention_mask": padding[:, None, None, :]})[~padding]
        assert torch.equal(found, expected)
        text = tiny.prompt(processor, ["Some words.", "And others."], padding=True)
        given = torch.arange(text["input_ids"].shape[1]).expand_as(text["input_ids"])
        assert torch.equal(pair.ours(**text, position_ids=given), pair.ours(**text))


@pytest.mark.parametrize("case", tiny.CASES)
def test_bf16(build: Any, processor: Any, case: str) -> None:
    """Both round in their own order: bf16 agrees with fp32 as well as Hugging Face's bf16 does."""
    pair = build(fields={"params_dtype": torch.bfloat16, "bf16": True}, case=case)
    for name, parameter in pair.ours.named_parameters():
        # The files, and so the model, may have these two in fp32.
        if not name.endswith(("A_log", "out_norm.weight")):
            assert parameter.dtype == torch.bfloat16, name
    asked = [
        tiny.prompt(processor, text.format(tiny.IMAGE), images=[photograph])
        for text in ("{} A flower?", "Hello {} you", "{} A longer question, and no answer.")
        for photograph in tiny.photographs()
    ]
    with torch.no_grad():
        exact = [pair.hf(**inputs).logits for inputs in asked]
        found = [pair.ours(**inputs, trim_vocab_padding=True) for inputs in asked]
        pair.hf.bfloat16()
        rounded = [pair.hf(**inputs).logits for inputs in asked]
    assert all(logits.dtype == torch.bfloat16 for logits in found)
    # The median token: where a rounding makes a router choose another expert, a token is far off.
    errors, their_errors = (
        [
            float(((one.float() - true).norm(dim=-1) / true.norm(dim=-1)).median())
            for one, true in zip(logits, exact, strict=True)
        ]
        for logits in (found, rounded)
    )
    ratios = [ours / theirs for ours, theirs in zip(errors, their_errors, strict=True)]
    # Of a single expert for each token, another one changes all that follows: the median prompt.
    of_prompts = median if "top1" in case else max
    assert of_prompts(ratios) <= 1.25
    assert of_prompts(errors) < 0.05


def test_empty_tensors_of_pictures_are_none(pair: SimpleNamespace, processor: Any) -> None:
    text = tiny.prompt(processor, "Only words.")
    empty = {"image_grid_thw": torch.zeros(0, 3).long(), "pixel_values": torch.zeros(0, 1536)}
    with torch.no_grad():
        expected = pair.ours(**text)
        assert torch.equal(pair.ours(**text, **empty), expected)
        assert torch.equal(pair.ours.train()(**text, **empty), expected)
    pair.ours.eval()


def test_padding_of_the_vocabulary_has_no_share(pair: SimpleNamespace, processor: Any) -> None:
    text = tiny.prompt(processor, "Only words.")
    with torch.no_grad():
        logits = pair.ours(**text)
        trimmed = pair.ours(**text, trim_vocab_padding=True)
    assert logits.shape[-1] > trimmed.shape[-1]
    for temperature in (0.01, 1.0):
        found, expected = ((one / temperature).log_softmax(-1) for one in (logits, trimmed))
        assert torch.equal(found[..., : trimmed.shape[-1]], expected)
        entropy = found.exp() * logits / temperature
        assert entropy.isfinite().all()
