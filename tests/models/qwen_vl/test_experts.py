"""Mixture of experts: the router's weights and the balance of the experts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from providers import one_process, small_provider

pytestmark = pytest.mark.usefixtures("on_the_gpu")


@pytest.fixture(autouse=True)
def _no_metrics_of_other_models() -> Iterator[None]:
    """megatron-core counts for one model per process."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    yield
    destroy_moe_metrics_tracker()


@pytest.fixture(scope="module")
def process() -> Iterator[None]:
    with one_process():
        yield


def build(family: str, **fields: Any) -> Any:
    provider = small_provider(family, **fields)
    return provider.provide_distributed_model(wrap_with_ddp=False)[0]


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_weighs_as_hugging_face(topk: int, dtype: torch.dtype) -> None:
    """Softmax over all experts, the best of them, normalized: as softmax over the best logits."""
    from transformers import Qwen3VLMoeConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

    text = {"num_experts": 7, "num_experts_per_tok": topk, "hidden_size": 80, "head_dim": 16}
    theirs = Qwen3VLMoeTextTopKRouter(Qwen3VLMoeConfig(text_config=text).text_config).to(dtype)
    torch.nn.init.normal_(theirs.weight, std=0.2)
    fields = {"moe_router_topk": topk, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    ours = build("qwen3_vl_moe", **fields).language_model.decoder.layers[1].mlp.router
    ours.weight.data.copy_(theirs.weight)

    x = torch.randn(50, 1, 80, dtype=dtype)
    with torch.no_grad():
        weights, chosen = ours(x)
        _, their_weights, their_choice = theirs(x.flatten(0, 1))
    expected = torch.zeros(50, 7, dtype=their_weights.dtype)
    expected.scatter_(1, their_choice, their_weights)
    assert torch.equal(chosen, expected > 0)
    assert weights.dtype == their_weights.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # half a unit of bf16 below 1
    torch.testing.assert_close(weights, expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_padding_does_not_count_in_the_balance_of_experts(family: str) -> None:
    model = build(family, moe_aux_loss_coeff=1.0).train()
    tokens = torch.randint(0, 299, (2, 9))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[:, 9:] = 0
    padded = torch.nn.functional.pad(tokens, (0, 4), value=7)

    alone = balance_gradients(model, input_ids=tokens)
    assert all(gradient.abs().max() > 1e-5 for gradient in alone)
    for theirs, ours in zip(
        alone, balance_gradients(model, input_ids=padded, attention_mask=mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    counted = balance_gradients(model, input_ids=padded)
    assert not torch.allclose(counted[0], alone[0], rtol=1e-2), "padding would have counted"


def balance_gradients(model: Any, **inputs: Tensor) -> list[Tensor]:
    """Gradients of the routers by their own loss alone: no token has a label."""
    model.zero_grad()
    labels = torch.full_like(inputs["input_ids"], -100)
    model(**inputs, labels=labels).sum().backward()
    layers = model.language_model.decoder.layers
    return [layer.mlp.router.weight.grad.clone() for layer in layers]
