"""Gradients of the same loss with respect to the same weights, compared in Hugging Face's names."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from oracle import tiny

# Recomputation is for training, where the loss has a part that balances the experts.
TRAINING = {"moe_aux_loss_coeff": 0.0}
RECOMPUTE = TRAINING | {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}
HYBRID = "qwen3_5_moe-2x_value_heads"


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
    hf.zero_grad(set_to_none=False)
    logits = hf(**inputs).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels_of(inputs).flatten(), reduction="none"
    ).view(1, -1)
    loss.sum().backward()
    return loss.detach(), gradients_on_disk(hf)


def gradients_on_disk(hf: Any) -> dict[str, Tensor]:
    """The gradients under the names of the weights in files, which are not those in memory."""
    with gradients_as_weights(hf), TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


@contextmanager
def gradients_as_weights(model: torch.nn.Module) -> Iterator[None]:
    weights = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        weights[parameter] = parameter.data
        parameter.data = parameter.grad
    try:
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


def our_loss_and_gradients(
    pair: SimpleNamespace, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    pair.ours.zero_grad()
    loss = pair.ours(**inputs, labels=labels_of(inputs))
    loss.sum().backward()
    return loss.detach(), dict(gradients_in_hf_names(pair))


def gradients_in_hf_names(pair: SimpleNamespace) -> Iterator[tuple[str, Tensor]]:
    """Export the model with its gradients in the place of its weights."""
    with gradients_as_weights(pair.ours):
        for name, gradient in pair.bridge.export_hf_weights([pair.ours]):
            # Megatron holds this weight less 1, which is no part of its gradient.
            yield name, gradient - 1.0 if name.endswith("linear_attn.norm.weight") else gradient + 0


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, theirs in expected.items():
        if max(theirs.norm(), found[name].norm()) <= 1e-6 * largest:
            continue  # Nothing but rounding: the weight of the only expert of a token is always 1.
        difference = (found[name] - theirs).norm() / theirs.norm()
        assert difference <= 1e-3, f"{name}: relative difference {difference}"


def test_loss_and_every_gradient(pair: SimpleNamespace, inputs: dict[str, Tensor]) -> None:
    expected_loss, expected = hf_loss_and_gradients(pair.hf, inputs)
    loss, found = our_loss_and_gradients(pair, inputs)
    assert (loss - expected_loss).abs().max() <= 1e-4
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("case", ["qwen3_vl", HYBRID])
def test_full_recompute(build: Any, inputs: dict[str, Tensor], case: str) -> None:
    pair = build(fields=RECOMPUTE, case=case)
    _, expected = hf_loss_and_gradients(pair.hf, inputs)
    pair.ours.train()
    calls: list[str] = []
    for part in ("vision_model", "language_model"):
        layer = pair.ours.get_submodule(f"{part}.decoder.layers.1")
        layer.register_forward_hook(lambda *_, part=part: calls.append(part))
    _, found = our_loss_and_gradients(pair, inputs)
    assert sorted(calls) == ["language_model"] * 2 + ["vision_model"] * 2
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("case", ["qwen3_vl", HYBRID])
def test_selective_recompute(build: Any, inputs: dict[str, Tensor], case: str) -> None:
    pair = build(fields=TRAINING | {"recompute_granularity": "selective"}, case=case)
    _, expected = hf_loss_and_gradients(pair.hf, inputs)
    pair.ours.train()
    _, found = our_loss_and_gradients(pair, inputs)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("case", ["qwen3_vl", "qwen3_5-3x_value_heads-one_kv_head"])
def test_tied_and_biased(build: Any, inputs: dict[str, Tensor], case: str) -> None:
    config = {"tie_word_embeddings": True, "text_config": {"attention_bias": True}}
    pair = build(config, case=case)
    expected_loss, expected = hf_loss_and_gradients(pair.hf, inputs)
    loss, found = our_loss_and_gradients(pair, inputs)
    assert (loss - expected_loss).abs().max() <= 1e-4
    assert "model.language_model.layers.3.self_attn.o_proj.bias" in found
    assert_equal_gradients(found, expected)


def test_text_only_batch_gives_gradients_of_the_text(pair: SimpleNamespace, processor: Any) -> None:
    inputs = tiny.prompt(processor, "No picture at all.")
    pair.ours.zero_grad()
    pair.ours(**inputs, labels=labels_of(inputs)).sum().backward()
    for name, parameter in pair.ours.named_parameters():
        assert (parameter.grad is not None) == name.startswith("language_model."), name


@pytest.mark.parametrize("frozen", [(), ("vision_model",), ("vision_model", "vision_projection")])
def test_in_training_a_batch_without_pictures_touches_the_encoder(
    build: Any, processor: Any, frozen: tuple[str, ...]
) -> None:
    """Data parallelism waits for every gradient; that of what is not used is zero."""
    ours = build(fields={f"freeze_{name}": True for name in frozen}).ours
    inputs = tiny.prompt(processor, "No picture at all.")
    expected = ours(**inputs, labels=labels_of(inputs))
    calls: list[bool] = []
    ours.vision_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss = ours.train()(**inputs, labels=labels_of(inputs))
    assert torch.equal(loss, expected)
    loss.sum().backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad and name.startswith("vision_model."):
            assert not parameter.grad.any(), name
    with torch.no_grad():
        ours(**inputs)
    assert calls == [True] * (len(frozen) < 2)
