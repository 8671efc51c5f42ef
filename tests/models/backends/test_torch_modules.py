"""Linears, MLPs, experts and attention of the torch backend, against those of megatron-core."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron.bridge.models.backends import torch_linear, torch_mlp
from megatron.bridge.models.backends.torch_self_attention import TorchSelfAttention
from providers import PROVIDERS, one_process, small_provider

pytestmark = pytest.mark.usefixtures("on_the_gpu")

INPUTS = {
    "input_ids": torch.tensor([[1, 302, *[300] * 6, 303, 2, 17, 5, 99]]),
    "pixel_values": torch.linspace(-1, 1, 24 * 1536).reshape(24, 1536),
    "image_grid_thw": torch.tensor([[1, 4, 6]]),
}

_BF16 = {"params_dtype": torch.bfloat16, "bf16": True}


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_process():
        yield


def build(family: str, **fields: Any) -> Any:
    provider = small_provider(family, **fields)
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits without gradients, and the gradients."""
    inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in INPUTS.items()}
    with torch.no_grad():
        logits = model.eval()(**inputs)
    model.train()(**inputs).square().mean().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return logits, gradients


@pytest.mark.parametrize(
    ("family", "fields"),
    [*((family, {}) for family in PROVIDERS), ("qwen3_vl", _BF16)],
    ids=str,
)
def test_the_same_as_megatron_core_computes(
    family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, **fields)
    logits, gradients = run(model)
    for module in (torch_linear, torch_mlp):
        monkeypatch.setattr(module, "is_plain", lambda _: False)
    monkeypatch.setattr(torch_mlp, "_is_plain_activation", lambda _: False)
    monkeypatch.setattr(TorchSelfAttention, "_can_rotate", lambda *_: False)
    expected, expected_gradients = run(model)
    tolerance = 0.05 if fields else 1e-5
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.any() or ".local_experts." in name, name
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("family", list(PROVIDERS))
def test_nothing_of_that_is_left_to_megatron_core(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)

    def fail(*_args: Any, **_more: Any) -> None:
        raise AssertionError("megatron-core was asked")

    monkeypatch.setattr(RowParallelLinear, "forward", fail)
    monkeypatch.setattr(SequentialMLP, "forward", fail)
    monkeypatch.setattr(attention, "apply_rotary_pos_emb", fail)
    if family != "qwen3_5_moe":  # its shared expert is one
        monkeypatch.setattr(MLP, "forward", fail)
    run(model)


def test_experts_without_tokens_have_gradients_of_zero() -> None:
    model = build("qwen3_vl_moe", num_moe_experts=40, moe_router_topk=1)
    _, gradients = run(model)
    of_experts = [one for name, one in gradients.items() if ".local_experts." in name]
    assert len(of_experts) == 5 * 40 * 2
    idle = [one for one in of_experts if not one.any()]
    assert len(of_experts) > len(idle) > 5 * 20 * 2


def test_who_listens_to_an_expert_hears_it_without_gradients() -> None:
    model = build("qwen3_vl_moe", num_moe_experts=3, moe_router_topk=2).eval()
    with torch.no_grad():
        alone = model(**INPUTS)
        heard: list[str] = []
        for name, module in model.named_modules():
            if name.endswith("local_experts.1.linear_fc2"):
                module.register_forward_hook(lambda *_, name=name: heard.append(name))
        listened = model(**INPUTS)
    assert len(set(heard)) == len(heard) == 5
    assert torch.equal(alone, listened)


_PLAIN: dict[str, Any] = {
    "tp_group.size": 1,
    "weight": "a parameter",
    "bias": "a parameter",
    "skip_bias_add": True,
    "is_expert": False,
    "gradient_accumulation_fusion": False,
    "gtp_remat_size": 1,
    "config.defer_embedding_wgrad_compute": False,
    "config._cpu_offloading_context": None,
    "config.bias_activation_fusion": False,
    "config.bias_dropout_fusion": False,
}


def linear(**changed: Any) -> Any:
    values = _PLAIN | {name.replace("__", "."): value for name, value in changed.items()}
    own = {name: value for name, value in values.items() if "." not in name}
    config = {n.removeprefix("config."): v for n, v in values.items() if n.startswith("config.")}
    group = SimpleNamespace(size=lambda: values["tp_group.size"])
    return SimpleNamespace(**own, config=SimpleNamespace(**config), tp_group=group)


@pytest.mark.parametrize(
    "changed",
    [
        {"tp_group__size": 2},
        {"weight": None},
        {"is_expert": True},
        {"gradient_accumulation_fusion": True},
        {"gtp_remat_size": 2},
        {"config__defer_embedding_wgrad_compute": True},
        {"config___cpu_offloading_context": "a context"},
        {"config__bias_activation_fusion": True},
        {"config__bias_dropout_fusion": True},
    ],
    ids=str,
)
def test_what_a_plain_linear_does_not_do(changed: dict[str, Any]) -> None:
    assert torch_linear.is_plain(linear())
    assert not torch_linear.is_plain(linear(**changed))
    if changed.keys() & {"is_expert", "config__bias_activation_fusion"}:
        assert torch_linear.is_plain(linear(**changed, bias=None))
