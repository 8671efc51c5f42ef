"""Norms and attention of the torch backend."""

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.backends.torch_attention import TorchCoreAttention
from megatron.bridge.models.backends.torch_norm import build_norm


def config(**fields: Any) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 2}
    return TransformerConfig(**sizes | {"attention_dropout": 0.0} | fields)


def test_rms_norm_rounds_as_hugging_face() -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

    check_norm(Qwen3VLTextRMSNorm(33, eps=1e-6), layernorm_zero_centered_gamma=False)


def test_zero_centered_rms_norm_rounds_as_hugging_face() -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

    check_norm(Qwen3_5RMSNorm(33, eps=1e-6), layernorm_zero_centered_gamma=True)


def check_norm(theirs: Any, **fields: Any) -> None:
    ours = build_norm(
        config(normalization="RMSNorm", params_dtype=torch.bfloat16, **fields), 33, eps=1e-6
    )
    theirs = theirs.bfloat16()
    assert torch.equal(ours.weight, theirs.weight), "different initial values"
    with torch.no_grad():
        theirs.weight.add_(torch.randn(33) * 0.3)
        ours.weight.copy_(theirs.weight)
    x = torch.randn(2, 5, 33, dtype=torch.bfloat16) * 3
    assert torch.equal(ours(x), theirs(x))


def test_layer_norm() -> None:
    ours = build_norm(config(normalization="LayerNorm", params_dtype=torch.bfloat16), 33, eps=1e-6)
    x = torch.randn(4, 33, dtype=torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(
        ours(x), torch.nn.functional.layer_norm(x, (33,), ours.weight, ours.bias, 1e-6)
    )


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms_are_marked_for_sequence_parallelism(normalization: str) -> None:
    norm = build_norm(
        config(normalization=normalization, sequence_parallel=True, tensor_model_parallel_size=2),
        33,
    )
    assert all(parameter.sequence_parallel for parameter in norm.parameters())


def test_norms_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="layernorm_zero_centered_gamma=True needs"):
        build_norm(config(layernorm_zero_centered_gamma=True), 33)
    with pytest.raises(ConfigError, match="normalization='L2Norm'"):
        build_norm(config(normalization="L2Norm"), 33)


def test_backends_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="transformer_impl='inference_optimized'"):
        get_backend("inference_optimized")


def attention(mask_type: AttnMaskType = AttnMaskType.causal) -> TorchCoreAttention:
    return TorchCoreAttention(config(), 1, mask_type, "self").eval()


def qkv(length: int = 7, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """6 query heads, 2 key and value heads of size 8, [s, b, heads, d]."""
    return (
        torch.randn(length, batch, 6, 8, requires_grad=True),
        torch.randn(length, batch, 2, 8, requires_grad=True),
        torch.randn(length, batch, 2, 8, requires_grad=True),
    )


def by_hand(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention written out; visible is broadcastable to [b, n, s, k]."""
    key, value = (tensor.repeat_interleave(3, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) / 8**0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("bnsk,kbnd->sbnd", weights, value).flatten(2)


def test_causal_and_full_attention() -> None:
    q, k, v = qkv()
    everything = torch.ones(7, 7, dtype=torch.bool)
    torch.testing.assert_close(attention()(q, k, v, None), by_hand(q, k, v, everything.tril()))
    full = attention(AttnMaskType.no_mask)(q, k, v, None)
    torch.testing.assert_close(full, by_hand(q, k, v, everything))
    overridden = attention()(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(overridden, full)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_combined_with_causal(side: str) -> None:
    q, k, v = qkv()
    real = torch.arange(7) < torch.tensor([[4], [7], [2]])
    if side == "left":
        real = real.flip(1)
    found = attention()(q, k, v, ~real[:, None, None, :])
    visible = real[:, None, None, :] & torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(found, by_hand(q, k, v, visible))
    found.sum().backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in (q, k, v))


def test_full_mask_and_nothing_visible() -> None:
    q, k, v = qkv()
    hidden = torch.rand(3, 1, 7, 7) < 0.4
    hidden[1, :, 3] = True
    found = attention(AttnMaskType.no_mask)(q, k, v, hidden)
    torch.testing.assert_close(found, by_hand(q, k, v, ~hidden))
    assert not found[3, 1].any()


def test_dropout_is_of_probabilities_as_in_hugging_face() -> None:
    """The same draw drops the same, so that values and gradients can be compared."""
    from types import SimpleNamespace

    from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

    # With sequence parallelism the caller has set the random state of the rank already.
    parallel = {"sequence_parallel": True, "tensor_model_parallel_size": 2}
    ours = TorchCoreAttention(
        config(attention_dropout=0.4, **parallel), 1, AttnMaskType.no_mask, "self"
    )
    inputs = [tensor.requires_grad_() for tensor in qkv()]
    torch.manual_seed(5)
    found = ours.train()(*inputs, None)
    found_gradients = torch.autograd.grad(found.square().sum(), inputs)

    theirs: Any = SimpleNamespace(num_key_value_groups=3, training=True)
    heads = [tensor.permute(1, 2, 0, 3) for tensor in inputs]
    torch.manual_seed(5)
    expected, _ = eager_attention_forward(
        theirs, *heads, None, scaling=heads[0].shape[-1] ** -0.5, dropout=0.4
    )
    expected = expected.transpose(0, 1).flatten(2)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradients, gradients)
    assert not torch.allclose(ours.eval()(*inputs, None), found)


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_sequences(mask_type: AttnMaskType) -> None:
    lengths = [3, 5, 3, 0, 2, 3]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (tensor.squeeze(1) for tensor in qkv(sum(lengths), 1))
    layer = attention(mask_type)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    found = layer(q, k, v, None, packed_seq_params=packed)
    alone = [
        layer(*(part[:, None] for part in parts), None).squeeze(1)
        for parts in zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
        if parts[0].shape[0]
    ]
    torch.testing.assert_close(found, torch.cat(alone))


def test_attention_refuses_what_it_does_not_implement() -> None:
    q, k, v = qkv(6, 1)
    flat = [tensor.squeeze(1) for tensor in (q, k, v)]
    boundaries = torch.tensor([0, 4], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    with pytest.raises(InputError, match="covers 4 tokens, the batch has 6"):
        attention()(*flat, None, packed_seq_params=packed)
    with pytest.raises(InputError, match="both given"):
        attention()(*flat, torch.zeros(1, 1, 1, 6).bool(), packed_seq_params=packed)
    with pytest.raises(InputError, match="attention_bias"):
        attention()(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(InputError, match="6 queries to 5 keys"):
        attention()(q, k[:5], v[:5], None)
    with pytest.raises(ConfigError, match="softmax_type='off-by-one'"):
        TorchCoreAttention(config(softmax_type="off-by-one"), 1, AttnMaskType.causal, "self")
    packed.cu_seqlens_q_padded = torch.tensor([0, 6])
    with pytest.raises(InputError, match="needs causal"):
        attention(AttnMaskType.no_mask)(*flat, None, packed_seq_params=packed)
