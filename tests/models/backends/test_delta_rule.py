"""The chunked delta rule and its convolution, against the same written token by token."""

import pytest
import torch
from torch import Tensor

from gated_delta_layers import KERNEL, KEY_HEADS, KEY_SIZE, VALUE_SIZE, gradients
from megatron.bridge.models.backends.delta_rule import causal_conv, gated_delta_rule

pytestmark = pytest.mark.usefixtures("on_the_gpu")


def token_by_token(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, lengths: list[int]
) -> Tensor:
    """The recurrence as it is defined, in the dtype of the inputs."""
    repeats = value.shape[1] // key.shape[1]
    query, key = (
        (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(repeats, 1)
        for x in (query, key)
    )
    outputs = []
    for sequence in torch.arange(value.shape[0]).split(lengths):
        memory = value.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        for t in sequence.tolist():
            memory = memory * g[t].exp()[:, None, None]
            held = torch.einsum("hkv,hk->hv", memory, key[t])
            change = (value[t] - held) * beta[t, :, None]
            memory = memory + torch.einsum("hk,hv->hkv", key[t], change)
            outputs.append(torch.einsum("hkv,hk->hv", memory, query[t]) / key.shape[2] ** 0.5)
    return torch.stack(outputs)


def rule_inputs(tokens: int, repeats: int, forget: float = 0.3) -> dict[str, Tensor]:
    torch.manual_seed(tokens + repeats)
    inputs = {
        "query": torch.randn(tokens, KEY_HEADS, KEY_SIZE),
        "key": torch.randn(tokens, KEY_HEADS, KEY_SIZE),
        "value": torch.randn(tokens, KEY_HEADS * repeats, VALUE_SIZE),
        "g": -forget * torch.rand(tokens, KEY_HEADS * repeats),
        "beta": torch.rand(tokens, KEY_HEADS * repeats),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths", [[1], [3], [64], [65], [201], [130, 1, 64, 3, 129], [0, 5, 0, 70]], ids=str
)
def test_chunks_are_the_recurrence(lengths: list[int], repeats: int) -> None:
    inputs = rule_inputs(sum(lengths), repeats)
    found = gated_delta_rule(**inputs, lengths=lengths)
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = token_by_token(**double, lengths=lengths)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    single = gradients(found, inputs)
    for name, gradient in gradients(expected.float(), double).items():
        scale = float(gradient.abs().max().clamp(min=1))
        difference = float((single[name] - gradient).abs().max())
        assert difference <= 1e-4 * scale, name


def test_a_token_that_forgets_everything_costs_no_precision() -> None:
    """The logarithms of the decays then differ by thousands."""
    inputs = {name: one.detach().double() for name, one in rule_inputs(96, 2, 0.1).items()}
    inputs["g"][::9] = -700.0
    found = gated_delta_rule(**{n: x.float() for n, x in inputs.items()}, lengths=[96])
    expected = token_by_token(**inputs, lengths=[96])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_the_chunk_size_only_rounds() -> None:
    inputs = rule_inputs(77, 2)
    torch.testing.assert_close(
        gated_delta_rule(**inputs, lengths=[40, 37], chunk_size=7),
        gated_delta_rule(**inputs, lengths=[40, 37]),
        rtol=0,
        atol=1e-6,
    )


def test_the_result_has_the_dtype_of_the_values_and_is_computed_in_fp32() -> None:
    inputs = {name: tensor.detach().bfloat16() for name, tensor in rule_inputs(50, 2).items()}
    found = gated_delta_rule(**inputs, lengths=[50])
    expected = token_by_token(**{n: x.double() for n, x in inputs.items()}, lengths=[50])
    assert found.dtype == torch.bfloat16
    # bf16 rounds by at most 2^-9 of the value.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [2, 3], [9, 1, 0, 4, 5]], ids=str)
def test_convolution_sees_only_what_came_before_in_the_sequence(lengths: list[int]) -> None:
    x = torch.randn(sum(lengths), 5, requires_grad=True)
    weight = torch.randn(5, 1, KERNEL, requires_grad=True)
    starts = [sum(lengths[:index]) for index, length in enumerate(lengths) for _ in range(length)]
    expected = torch.stack(
        [
            sum(
                weight[:, 0, KERNEL - 1 - back] * x[t - back]
                for back in range(KERNEL)
                if t - back >= starts[t]
            )
            for t in range(sum(lengths))
        ]
    )
    found = causal_conv(x, weight, lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    inputs = {"x": x, "weight": weight}
    for name, gradient in gradients(expected, inputs).items():
        torch.testing.assert_close(
            gradients(causal_conv(x, weight, lengths), inputs)[name], gradient, rtol=0, atol=1e-5
        )
