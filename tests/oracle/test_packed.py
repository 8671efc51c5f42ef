"""Packed sequences and bf16."""

from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from oracle import tiny


def packed(prompts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The prompts one after the other in one row."""
    lengths = torch.tensor([prompt["input_ids"].shape[1] for prompt in prompts])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
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
