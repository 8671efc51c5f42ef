"""Gradients of the same loss with respect to the same weights, compared in Hugging Face's names."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from oracle import tiny

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}


@pytest.fixture(scope="module")
def inputs(processor: Any) -> dict[str, Tensor]:
    return tiny.prompt(
        processor,
        f"First {tiny.IMAGE} then {tiny.VIDEO} and {tiny.IMAGE}: which?",
        images=tiny.photographs(),
        videos=[tiny.video()],
    )


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The next token, without a loss on pictures and on the last position."""
    labels = inputs["input_ids"].roll(-1, dims=1)
    labels[inputs["mm_token_type_ids"] != 0] = -100
    labels[:, -1] = -100
    return labels


def hf_loss_and_gradients(hf: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    hf.zero_grad()
    logits = hf(**inputs).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels_of(inputs).flatten(), reduction="none"
    ).view(1, -1)
    loss.sum().backward()
    return loss.detach(), {name: weight.grad for name, weight in hf.named_parameters()}


def our_loss_and_gradients(
    pair: SimpleNamespace, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    pair.ours.zero_grad()
    loss = pair.ours(**inputs, labels=labels_of(inputs))
    loss.sum().backward()
    return loss.detach(), dict(gradients_in_hf_names(pair))


def gradients_in_hf_names(pair: SimpleNamespace) -> Iterator[tuple[str, Tensor]]:
    """Export the model with its gradients in the place of its weights."""
    weights = {}
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        weights[parameter] = parameter.data
        parameter.data = parameter.grad
    try:
        for name, gradient in pair.bridge.export_hf_weights([pair.ours]):
            yield name, gradient.clone()
    finally:
        for parameter, data in weights.items():
            parameter.data = data


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, theirs in expected.items():
        difference = (found[name] - theirs).norm() / theirs.norm().clamp(min=1e-6 * largest)
        assert difference <= 1e-3, f"{name}: relative difference {difference}"


def test_loss_and_every_gradient(pair: SimpleNamespace, inputs: dict[str, Tensor]) -> None:
    expected_loss, expected = hf_loss_and_gradients(pair.hf, inputs)
    loss, found = our_loss_and_gradients(pair, inputs)
    assert (loss - expected_loss).abs().max() <= 1e-4
    assert_equal_gradients(found, expected)


def test_full_recompute(build: Any, inputs: dict[str, Tensor]) -> None:
    pair = build(fields=RECOMPUTE)
    _, expected = hf_loss_and_gradients(pair.hf, inputs)
    pair.ours.train()
    calls: list[str] = []
    for part in ("vision_model", "language_model"):
        layer = pair.ours.get_submodule(f"{part}.decoder.layers.1")
        layer.register_forward_hook(lambda *_, part=part: calls.append(part))
    _, found = our_loss_and_gradients(pair, inputs)
    assert sorted(calls) == ["language_model"] * 2 + ["vision_model"] * 2
    assert_equal_gradients(found, expected)


def test_selective_recompute(build: Any, inputs: dict[str, Tensor]) -> None:
    pair = build(fields={"recompute_granularity": "selective"})
    _, expected = hf_loss_and_gradients(pair.hf, inputs)
    pair.ours.train()
    _, found = our_loss_and_gradients(pair, inputs)
    assert_equal_gradients(found, expected)


def test_tied_and_biased(build: Any, inputs: dict[str, Tensor]) -> None:
    pair = build({"tie_word_embeddings": True, "text_config": {"attention_bias": True}})
    expected_loss, expected = hf_loss_and_gradients(pair.hf, inputs)
    loss, found = our_loss_and_gradients(pair, inputs)
    assert (loss - expected_loss).abs().max() <= 1e-4
    assert "model.language_model.layers.0.self_attn.o_proj.bias" in found
    found.pop("lm_head.weight", None)
    assert_equal_gradients(found, expected)


def test_text_only_batch_gives_gradients_of_the_text(pair: SimpleNamespace, processor: Any) -> None:
    inputs = tiny.prompt(processor, "No picture at all.")
    pair.ours.zero_grad()
    pair.ours(**inputs, labels=labels_of(inputs)).sum().backward()
    for name, parameter in pair.ours.named_parameters():
        assert (parameter.grad is not None) == name.startswith("language_model."), name
