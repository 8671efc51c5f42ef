"""The forward and the backward of small models, beside those of transformers with SDPA.

    python -m benchmarks.live_forward [--threads 1] [--family qwen3.5] [--rounds 5]

Both models have the same random weights in one process, and get the same prompt of 500 tokens with
a picture. They run in turns, and what counts is the median of the ratios of processor time of each
round: what else the machine does meanwhile falls on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TOKENS = 500
PICTURE = (1, 16, 24)
"""Frames, rows and columns in patches."""

_WIDE = {
    "text_config.hidden_size": 512,
    "text_config.vocab_size": 8192,
    "text_config.num_hidden_layers": 8,
    "text_config.head_dim": 128,
    "text_config.num_attention_heads": 8,
    "vision_config.hidden_size": 384,
    "vision_config.intermediate_size": 1536,
    "vision_config.num_heads": 6,
    "vision_config.depth": 6,
}
_DENSE = {"text_config.intermediate_size": 1536}
_EXPERTS = {
    "text_config.num_experts": 32,
    "text_config.num_experts_per_tok": 4,
    "text_config.moe_intermediate_size": 192,
}
_LINEAR = {
    "text_config.linear_num_key_heads": 4,
    "text_config.linear_num_value_heads": 8,
    "text_config.linear_key_head_dim": 128,
    "text_config.linear_value_head_dim": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3-vl": _WIDE | _DENSE,
    "qwen3-vl-moe": _WIDE | _EXPERTS,
    "qwen3.5": _WIDE | _DENSE | _LINEAR,
    "qwen3.5-moe": _WIDE
    | _EXPERTS
    | _LINEAR
    | {"text_config.shared_expert_intermediate_size": 192},
}
"""Settings of `make_model`: sizes between those of tests and those of releases."""

TINY = {"vision_config.depth": 3, "text_config.num_hidden_layers": 3}
"""Those of the tests, of any family."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Processor seconds of each round, ours and transformers', and the median of their ratios."""

    family: str
    threads: int
    step: str
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Ours as a multiple of transformers'."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def compare(
    family: str, settings: Mapping[str, Any], *, threads: int, rounds: int
) -> list[Comparison]:
    """Both steps of one family."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = both_models(family, settings, Path(folder) / "model")
    inputs = prompt(theirs.config)
    return [
        _in_turns(family, threads, rounds, step, ours, theirs, inputs)
        for step in ("forward", "forward and backward")
    ]


def both_models(family: str, settings: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """Ours and transformers' model of the same files, float32."""
    from transformers import AutoModelForImageTextToText

    from megatron.bridge import AutoBridge
    from megatron.bridge.synthetic import make_model

    make_model(family, folder, {"dtype": "float32", **settings})
    theirs = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    )
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.params_dtype, provider.bf16 = torch.float32, False
    [ours] = provider.provide_distributed_model(wrap_with_ddp=False)
    return ours, theirs


def prompt(config: Any) -> dict[str, torch.Tensor]:
    """TOKENS tokens, those of a picture among them; the same every time."""
    generator = torch.Generator().manual_seed(7)
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([PICTURE])
    features = int(grid.prod()) // merge**2
    text = torch.randint(0, 256, (1, TOKENS), generator=generator)
    text[0, 20] = config.vision_start_token_id
    text[0, 21 : 21 + features] = config.image_token_id
    text[0, 21 + features] = config.vision_end_token_id
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": text,
        "mm_token_type_ids": (text == config.image_token_id).long(),
        "pixel_values": torch.randn(int(grid.prod()), patch, generator=generator),
        "image_grid_thw": grid,
    }


def run(model: Any, inputs: Mapping[str, torch.Tensor], step: str, **more: Any) -> torch.Tensor:
    """One step of a model; returns its logits."""
    if step == "forward":
        with torch.no_grad():
            return _logits(model(**inputs, **more))
    logits = _logits(model(**inputs, **more))
    logits.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return logits.detach()


def _logits(output: Any) -> torch.Tensor:
    return getattr(output, "logits", output)  # type: ignore[no-any-return]


def _in_turns(
    family: str,
    threads: int,
    rounds: int,
    step: str,
    ours: Any,
    theirs: Any,
    inputs: Mapping[str, torch.Tensor],
) -> Comparison:
    for model in (ours, theirs):
        model.train(step != "forward")
    runs: list[tuple[list[float], Callable[[], torch.Tensor]]] = [
        ([], lambda: run(ours, inputs, step, trim_vocab_padding=True)),
        ([], lambda: run(theirs, inputs, step, use_cache=False)),
    ]
    expected = runs[1][1]()
    found = runs[0][1]()
    if (worst := float((found - expected).abs().max())) > 1e-2:
        raise SystemExit(f"{family}: the logits differ by {worst}")
    for number in range(rounds):
        for seconds, one in runs if number % 2 else reversed(runs):
            begin = time.process_time()
            one()
            seconds.append(time.process_time() - begin)
    return Comparison(family, threads, step, runs[0][0], runs[1][0])


def main() -> None:
    """Measure what the arguments ask for, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_forward", description=__doc__)
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--family", choices=list(FAMILIES), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the widths of the tests, to try it")
    arguments = parser.parse_args()
    found = []
    for threads in arguments.threads or (1, 2):
        for family in arguments.family or FAMILIES:
            settings = TINY if arguments.tiny else FAMILIES[family]
            for one in compare(family, settings, threads=threads, rounds=arguments.rounds):
                found.append(one)
                print(
                    f"{one.family:14} {one.threads} thread{'s' * (one.threads > 1):1} "
                    f"{one.step:21} {one.ratio:5.2f} times transformers' "
                    f"({statistics.median(one.ours):.3f} s, {statistics.median(one.theirs):.3f} s)",
                    file=sys.stderr if arguments.json else sys.stdout,
                    flush=True,
                )
    if arguments.json:
        print(json.dumps([asdict(one) | {"ratio": one.ratio} for one in found]))


if __name__ == "__main__":
    main()
