"""Gradients with transformers' loss over the routers of all layers, and without it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import tiny
from oracle.test_gradients import (
    assert_equal_gradients,
    gradients_in_hf_names,
    gradients_on_disk,
    labels_of,
)

CASES = [case for case in tiny.CASES if "moe" in case]
# Large, so that the loss of the routers counts beside that of the tokens.
COEF = 0.5
ON = {"text_config": {"output_router_logits": True, "router_aux_loss_coef": COEF}}
OFF = {"text_config": {"output_router_logits": False, "router_aux_loss_coef": COEF}}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}


@pytest.fixture(scope="module")
def inputs(processor: Any) -> dict[str, Tensor]:
    """Two prompts of different lengths: padding does not count."""
    texts = [f"First {tiny.IMAGE} and {tiny.IMAGE}: which?", "No picture."]
    return tiny.prompt(
        processor, texts, images=tiny.photographs(), padding=True, padding_side="right"
    )


@pytest.fixture(scope="module")
def other_inputs(processor: Any) -> dict[str, Tensor]:
    return tiny.prompt(processor, "A sentence of its own, without a picture.")


def targets(inputs: dict[str, Tensor]) -> Tensor:
    """The token that follows, -100 for pictures and padding."""
    labels = labels_of(inputs)
    labels[inputs["attention_mask"] == 0] = -100
    return labels


def hf_loss(hf: Any, inputs: dict[str, Tensor]) -> Tensor:
    """transformers' own loss, which shifts the labels itself."""
    labels = targets(inputs).roll(1, dims=1)
    labels[:, 0] = -100
    loss: Tensor = hf(**inputs, labels=labels).loss
    return loss


def our_loss(ours: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens, as a training loop takes it."""
    labels = targets(inputs)
    loss: Tensor = ours(**inputs, labels=labels)
    return loss.sum() / (labels != -100).sum()


def hf_gradients(pair: SimpleNamespace, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    pair.hf.zero_grad(set_to_none=False)
    for parameter in pair.hf.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for inputs in batches:
        hf_loss(pair.hf, inputs).backward()
    return gradients_on_disk(pair.hf)


def our_gradients(pair: SimpleNamespace, *losses: Tensor) -> dict[str, Tensor]:
    """All forward passes ran before the first backward pass."""
    pair.ours.zero_grad()
    for parameter in pair.ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for loss in losses:
        loss.backward()
    return dict(gradients_in_hf_names(pair))


def routers(gradients: dict[str, Tensor]) -> list[Tensor]:
    found = [x for name, x in gradients.items() if name.endswith("mlp.gate.weight")]
    assert found
    return found


@pytest.mark.parametrize("case", CASES)
def test_switched_on(build: Any, inputs: dict[str, Tensor], case: str) -> None:
    pair = build(ON, case=case)
    expected = hf_gradients(pair, inputs)
    assert all(gradient.norm() > 1e-4 for gradient in routers(expected))
    for mode in (True, False):  # dropout aside, training and evaluation are the same
        found = our_gradients(pair, our_loss(pair.ours.train(mode), inputs))
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_switched_off(build: Any, inputs: dict[str, Tensor], case: str) -> None:
    """The coefficient alone means nothing: transformers' default is not to add the loss."""
    pair = build(OFF, case=case)
    expected = hf_gradients(pair, inputs)
    found = our_gradients(pair, our_loss(pair.ours.train(), inputs))
    assert_equal_gradients(found, expected)
    if case.endswith("top1"):
        assert max(gradient.abs().max() for gradient in routers(found)) < 1e-6


@pytest.mark.parametrize("recompute", [{}, RECOMPUTE], ids=["kept", "recomputed"])
def test_two_forward_passes_before_the_backward_passes(
    build: Any,
    inputs: dict[str, Tensor],
    other_inputs: dict[str, Tensor],
    recompute: dict[str, Any],
) -> None:
    """And others in between: one without gradients, one that has no labels and so no such loss."""
    pair = build(ON, recompute, case="qwen3_vl_moe-dense_layers-one_kv_head-top1")
    expected = hf_gradients(pair, inputs, other_inputs)
    ours = pair.ours.train()
    losses = [our_loss(ours, inputs), our_loss(ours, other_inputs)]
    with torch.no_grad():
        ours(**other_inputs)
    logits = ours(**other_inputs)
    assert_equal_gradients(our_gradients(pair, *losses), expected)
    alone = our_gradients(pair, logits.square().mean())
    assert max(gradient.abs().max() for gradient in routers(alone)) < 1e-6
    assert_equal_gradients(our_gradients(pair, sum_of(ours, inputs, other_inputs)), expected)


def sum_of(ours: Any, *batches: dict[str, Tensor]) -> Tensor:
    return torch.stack([our_loss(ours, inputs) for inputs in batches]).sum()


def test_the_scale_of_the_loss(build: Any, inputs: dict[str, Tensor]) -> None:
    """A schedule of megatron-core scales the loss, and tells the routers' loss by how much."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    pair = build(ON, case="qwen3_vl_moe")
    expected = hf_gradients(pair, inputs)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25))
    try:
        found = our_gradients(pair, 0.25 * our_loss(pair.ours.train(), inputs))
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
    assert_equal_gradients({name: 4 * x for name, x in found.items()}, expected)

    # With this option the gradients are divided by the number of tokens at the end.
    pair.ours.config.calculate_per_token_loss = True
    counted = int((targets(inputs) != -100).sum())
    found = our_gradients(pair, counted * our_loss(pair.ours, inputs))
    assert_equal_gradients({name: x / counted for name, x in found.items()}, expected)


def test_the_loss_of_megatron_core_takes_its_place(build: Any, inputs: dict[str, Tensor]) -> None:
    fields = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3}
    pair = build(ON, fields, case="qwen3_vl_moe")
    of_config = build(OFF, fields, case="qwen3_vl_moe")
    found, alone = (
        our_gradients(one, our_loss(one.ours.train(), inputs)) for one in (pair, of_config)
    )
    assert_equal_gradients(found, alone)
    expected = hf_gradients(of_config, inputs)
    difference = torch.stack(routers(alone)) - torch.stack(routers(expected))
    assert difference.norm() > 1e-2 * torch.stack(routers(expected)).norm()


def test_a_layout_in_which_no_stage_has_all_routers(processor: Any) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.errors import ConfigError

    config = tiny.build_config(processor, "qwen3_vl_moe", dtype="float32", **ON)
    provider: Any = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert provider.router_aux_loss_coef == COEF
    provider.pipeline_model_parallel_size = 5
    with pytest.raises(ConfigError, match=r"size is 5 with router_aux_loss_coef \(output_router"):
        provider.finalize()
    provider.router_aux_loss_coef = 0.0
    assert not any("router" in problem for problem in provider.problems())
