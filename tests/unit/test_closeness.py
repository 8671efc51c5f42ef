"""How close the models are on a photograph, and on words alone: rounding, and nothing else.

What a model computes is taken to be what transformers computes in float64 throughout. How far its
own float32 is from that is the measure of rounding: no other float32 can be expected to do better.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.verification.distance import Distance, distance
from megatron.bridge.operations.verification.float64 import float64_throughout, restore_frequencies
from megatron.bridge.operations.verification.forward import (
    prompt_inputs,
    run_megatron,
    run_transformers,
)
from megatron.bridge.synthetic import make_model

# Two errors of one size, independent of one another, are sqrt(2) times that size apart.
INDEPENDENT = 2**0.5
# The same rounding errors add up differently from one processor to another.
LUCK = 1.25


@dataclass(frozen=True)
class Closeness:
    """Distances of logits on one prompt; `exact` are transformers' in float64."""

    tokens: int
    image_tokens: int
    both_in_float64: Distance
    both_in_float32: Distance
    hf_from_exact: Distance
    megatron_from_exact: Distance


def measure(hf: PreTrainedVLM, inputs: dict[str, torch.Tensor]) -> Closeness:
    logits = {}
    for dtype in (torch.float64, torch.float32):
        theirs, hidden = run_transformers(hf, inputs, dtype)
        ours, layers = run_megatron(hf, inputs, dtype, hidden)
        assert theirs.dtype is ours.dtype is dtype
        assert len(layers) == len(hidden)
        logits[dtype] = theirs, ours
    exact, megatron_exact = logits[torch.float64]
    theirs, ours = logits[torch.float32]
    assert exact.std() > 0.1, "the logits are too flat to compare"
    image = inputs["input_ids"] == hf.hf_config.require("image_token_id", int)
    return Closeness(
        tokens=image.numel(),
        image_tokens=int(image.sum()),
        both_in_float64=distance(exact, megatron_exact),
        both_in_float32=distance(theirs, ours),
        hf_from_exact=distance(exact, theirs),
        megatron_from_exact=distance(exact, ours),
    )


@pytest.fixture(
    scope="module",
    params=[("qwen3.5", 0), ("qwen3.5", 1), ("qwen3.5-moe", 0)],
    ids=lambda param: f"{param[0]}, seed {param[1]}",
)
def photograph_and_words(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Closeness, Closeness]:
    """One model on a photograph, and on words that are as many tokens."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    family, seed = request.param
    folder = tmp_path_factory.mktemp("models") / "model"
    hf = PreTrainedVLM.from_pretrained(make_model(family, folder, seed=seed))
    picture = Image.fromarray(load_sample_images().images[0]).resize((150, 100))
    with_picture = prompt_inputs(hf, "Describe this image.", picture)
    # The tokens of this tokenizer are bytes.
    missing = with_picture["input_ids"].numel() - prompt_inputs(hf, "")["input_ids"].numel()
    words = prompt_inputs(hf, ("Why is the sky blue? " * missing)[:missing])
    return measure(hf, with_picture), measure(hf, words)


def test_prompts_of_one_length(photograph_and_words: tuple[Closeness, Closeness]) -> None:
    photograph, words = photograph_and_words
    assert photograph.tokens == words.tokens
    assert photograph.image_tokens > photograph.tokens / 2
    assert words.image_tokens == 0


def test_the_models_compute_the_same(
    photograph_and_words: tuple[Closeness, Closeness],
) -> None:
    """In float64 next to nothing is left, of either prompt."""
    for prompt in photograph_and_words:
        assert prompt.both_in_float64.relative_rms_diff < 1e-13
        assert prompt.both_in_float64.max_abs_diff < 1e-12


def test_megatron_rounds_no_worse_than_transformers(
    photograph_and_words: tuple[Closeness, Closeness],
) -> None:
    for prompt in photograph_and_words:
        noise = prompt.hf_from_exact.relative_rms_diff
        assert prompt.megatron_from_exact.relative_rms_diff <= LUCK * noise
        assert prompt.both_in_float32.relative_rms_diff <= INDEPENDENT * noise


def test_a_photograph_is_as_close_as_words(
    photograph_and_words: tuple[Closeness, Closeness],
) -> None:
    photograph, words = photograph_and_words
    for prompt in photograph_and_words:
        assert prompt.both_in_float32.max_abs_diff < 1e-4
        assert prompt.both_in_float32.relative_rms_diff < 1e-5
    far, near = photograph.megatron_from_exact, words.megatron_from_exact
    assert far.relative_rms_diff <= INDEPENDENT * near.relative_rms_diff


def test_float64_throughout() -> None:
    whole = torch.arange(1, 4)
    with float64_throughout():
        for found in (
            whole.float(),
            whole.to(torch.float32),
            whole / 3,
            torch.zeros(2, dtype=torch.float32),
            torch.randn(2, 5).softmax(-1, dtype=torch.float32),
            torch.tensor(0.5),
        ):
            assert found.dtype is torch.float64
        assert whole.to(torch.bfloat16).dtype is torch.bfloat16


def test_float32_is_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), float64_throughout():
        1 / 0  # noqa: B018
    assert torch.get_default_dtype() is torch.float32
    assert torch.ones(2).double().float().dtype is torch.float32


def test_frequencies_are_restored() -> None:
    """A cast leaves them rounded, and what is not rotary is left alone."""
    from transformers import AutoConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

    config = AutoConfig.for_model("qwen3_5_text")
    rotary = Qwen3_5TextRotaryEmbedding(config)
    model = torch.nn.Sequential(rotary, torch.nn.BatchNorm1d(3)).double()
    rope = config.rope_parameters
    size = int(config.head_dim * rope["partial_rotary_factor"])
    steps = torch.arange(0, size, 2, dtype=torch.float64)
    exact = rope["rope_theta"] ** (-steps / size)
    assert (rotary.inv_freq - exact).abs().max() > 1e-10
    restore_frequencies(model)
    assert rotary.inv_freq.dtype is torch.float64
    torch.testing.assert_close(rotary.inv_freq, exact, rtol=1e-15, atol=0)
    assert model[1].running_mean.tolist() == [0.0] * 3


def test_relative_rms_does_not_depend_on_scale_or_size() -> None:
    generator = torch.Generator().manual_seed(5)
    a, noise = torch.randn(2, 1, 140, 9, generator=generator, dtype=torch.float64)
    found = distance(a, a + 1e-3 * noise)
    expected = 1e-3 * (noise.square().mean() / a.square().mean()).sqrt().item()
    assert found.relative_rms_diff == pytest.approx(expected)
    doubled = distance(torch.cat([a, a]), torch.cat([a, a]) + 1e-3 * torch.cat([noise, noise]))
    assert doubled.relative_rms_diff == pytest.approx(expected)
    assert distance(64 * a, 64 * a + 0.064 * noise).relative_rms_diff == pytest.approx(expected)
    assert distance(a, 1.5 * a).relative_rms_diff == pytest.approx(0.5)
    assert distance(a, 1.5 * a).cosine == pytest.approx(1.0)  # which does not see a scale
