"""Gated DeltaNet in plain torch.

Against transformers' layer and megatron-core's own class.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, common
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gated_delta_layers import (
    HIDDEN,
    KERNEL,
    KEY_HEADS,
    KEY_SIZE,
    VALUE_SIZE,
    build,
    config,
    gradients,
    random_layer,
    run,
)
from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.live.local_tensors import local_tensors
from megatron.bridge.models.backends.gated_delta_net import (
    gated_delta_net_module,
    gated_delta_net_spec,
)
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.backends.torch_gated_delta_net import TorchGatedDeltaNet
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.runtime.parallel import (
    destroy_process_groups,
    fake_cluster,
    initialize_process_groups,
)
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.boxes import tiling_faults

pytestmark = pytest.mark.usefixtures("on_the_gpu")


@pytest.fixture
def process_groups() -> Iterator[None]:
    initialize_process_groups(ParallelSizes())
    yield
    destroy_process_groups()


def assert_relative(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error, size = float((found[name] - gradient).norm()), float(gradient.norm())
        assert error <= limit * size, (name, error, size)


# --- The layer -----------------------------------------------------------------------------------


def hugging_face(layer: Any) -> Any:
    """transformers' layer with the weights of `layer`."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    fields = layer.config
    theirs = Qwen3_5GatedDeltaNet(
        Qwen3_5TextConfig(
            hidden_size=fields.hidden_size,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            rms_norm_eps=fields.layernorm_epsilon,
            linear_conv_kernel_dim=fields.linear_conv_kernel_dim,
            linear_key_head_dim=fields.linear_key_head_dim,
            linear_value_head_dim=fields.linear_value_head_dim,
            linear_num_key_heads=fields.linear_num_key_heads,
            linear_num_value_heads=fields.linear_num_value_heads,
        ),
        layer_idx=0,
    )
    weights = as_hugging_face({n: p.detach() for n, p in layer.named_parameters()}, theirs)
    weights["norm.weight"] = weights["norm.weight"] + 1
    theirs.load_state_dict(weights, strict=True)
    return theirs


def as_hugging_face(tensors: dict[str, Tensor], theirs: Any) -> dict[str, Tensor]:
    """Parameters or gradients under Hugging Face's names."""
    sizes = [2 * theirs.key_dim + theirs.value_dim, theirs.value_dim, theirs.num_v_heads]
    parts = tensors["in_proj.weight"].split([*sizes, sizes[-1]])
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    renamed = {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
    renamed["norm.weight"] = tensors["out_norm.weight"]
    for name in ("conv1d.weight", "A_log", "dt_bias", "out_proj.weight"):
        renamed[name] = tensors[name]
    return renamed


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 3, 130])
def test_hugging_face_says_the_same(length: int, repeats: int) -> None:
    layer = random_layer(config(repeats))
    theirs = hugging_face(layer)
    x = torch.randn(2, length, HIDDEN, requires_grad=True)
    found, expected = run(layer, x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    ours = gradients(found, {"x": x, **dict(layer.named_parameters())})
    assert_relative(
        {"x": ours.pop("x"), **as_hugging_face(ours, theirs)},
        gradients(expected, {"x": x, **dict(theirs.named_parameters())}),
        1e-3,
    )


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_zero_input(side: str) -> None:
    layer = random_layer(config())
    theirs = hugging_face(layer)
    real = torch.arange(70) < torch.tensor([[41], [70], [2]])
    if side == "left":
        real = real.flip(1)
    x = torch.randn(3, 70, HIDDEN, requires_grad=True)
    found = run(layer, x, ~real[:, None, None, :])
    expected = theirs(x, attention_mask=real)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    alone = run(layer, x[:1, real[0]])
    torch.testing.assert_close(found[:1, real[0]], alone, rtol=0, atol=1e-5)
    ours = gradients(found[real], {"x": x})["x"]
    assert_relative({"x": ours}, {"x": gradients(expected[real], {"x": x})["x"]}, 1e-3)
    assert not ours[~real].any()


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences_are_those_one_by_one(padded: bool) -> None:
    layer = random_layer(config())
    lengths = [3, 65, 1, 130, 2, 65]
    room = [length + 3 * padded for length in lengths]
    x = torch.randn(1, sum(room), HIDDEN, requires_grad=True)
    boundaries, padded_boundaries = (
        torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (lengths, room)
    )
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded_boundaries if padded else None,
        cu_seqlens_kv_padded=padded_boundaries if padded else None,
    )
    found = torch.cat(
        [
            part[:, :length]
            for part, length in zip(
                run(layer, x, packed_seq_params=packed).split(room, dim=1), lengths, strict=True
            )
        ],
        dim=1,
    )
    alone = torch.cat(
        [run(layer, part[:, :n]) for part, n in zip(x.split(room, 1), lengths, strict=True)], dim=1
    )
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    inputs = {"x": x, **dict(layer.named_parameters())}
    assert_relative(gradients(found, inputs), gradients(alone, inputs), 1e-4)


@pytest.mark.usefixtures("process_groups")
def test_every_run_gives_the_same_bits() -> None:
    layer = random_layer(config())
    x = torch.randn(2, 130, HIDDEN)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(layer, x) for _ in range(2)]
        found = [gradients(output, dict(layer.named_parameters())) for output in runs]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs)
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.usefixtures("process_groups")
def test_inputs_that_do_not_fit() -> None:
    layer = random_layer(config())
    x = torch.randn(2, 6, HIDDEN)
    boundaries = torch.tensor([0, 4], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    with pytest.raises(InputError, match="inference_context"):
        run(layer, x, inference_context=object())
    with pytest.raises(InputError, match=r"shape \[2, 1, 6, 6\], expected \[2, 1, 1, 6\]"):
        run(layer, x, torch.zeros(2, 1, 6, 6).bool())
    with pytest.raises(InputError, match="a batch of 2 and attention_mask None"):
        run(layer, x, packed_seq_params=packed)
    with pytest.raises(InputError, match="a batch of 1 and attention_mask set"):
        run(layer, x[:1], torch.zeros(1, 1, 1, 6).bool(), packed_seq_params=packed)
    with pytest.raises(InputError, match="covers 4 tokens, the batch has 6"):
        run(layer, x[:1], packed_seq_params=packed)


@pytest.mark.usefixtures("process_groups")
def test_configs_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="experimental_attention_variant=None"):
        build(config(experimental_attention_variant=None))
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["gdn_norm_out"]}
    with pytest.raises(ConfigError, match="does not implement 'gdn_norm_out'"):
        build(config(**recompute))


# --- Dtypes --------------------------------------------------------------------------------------


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


@pytest.mark.usefixtures("process_groups")
def test_fp32_parameters_survive_a_bf16_model() -> None:
    bf16 = config(params_dtype=torch.bfloat16, bf16=True)
    layer = build(bf16, torch.float32)
    with torch.no_grad():
        layer.A_log.fill_(1 / 3)
        layer.out_norm.weight.fill_(1 / 3)
    layer.A_log.grad = torch.full_like(layer.A_log, 1 / 3)
    wrapped = Float16Module(bf16, layer).module
    fp32 = {name for name, dtype in dtypes(wrapped).items() if dtype == torch.float32}
    assert fp32 == {"A_log", "out_norm.weight"}
    for tensor in (layer.A_log, layer.A_log.grad, layer.out_norm.weight):
        assert torch.equal(tensor, torch.full_like(tensor, 1 / 3))
    saved = {local.key: local.data.dtype for local in local_tensors([wrapped])}
    assert {key for key, dtype in saved.items() if dtype == torch.float32} == fp32

    output = run(layer, torch.randn(2, 9, HIDDEN, dtype=torch.bfloat16))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.A_log.grad.dtype == torch.float32
    assert set(dtypes(wrapped.double()).values()) == {torch.float64}


@pytest.mark.usefixtures("process_groups")
def test_parameters_have_the_dtype_of_megatron_core_otherwise() -> None:
    layer = build(config(params_dtype=torch.bfloat16))
    assert set(dtypes(layer).values()) == {torch.bfloat16}
    assert set(dtypes(layer.float()).values()) == {torch.float32}
    assert set(dtypes(layer.bfloat16()).values()) == {torch.bfloat16}


# --- megatron-core's own class -------------------------------------------------------------------


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let megatron-core's class be built: of flash-linear-attention it then needs one function."""
    monkeypatch.setattr(common, "HAVE_FLA", True)
    monkeypatch.setattr(
        common, "l2norm", lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    )


def build_stock(layer_config: TransformerConfig) -> Any:
    ours = gated_delta_net_spec(layer_config, get_backend("local"))
    return build_module(
        ModuleSpec(module=GatedDeltaNet, submodules=ours.submodules),
        config=layer_config,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


@pytest.mark.usefixtures("process_groups", "stock")
@pytest.mark.parametrize("repeats", [1, 3])
def test_megatron_core_says_the_same(repeats: int) -> None:
    layer = random_layer(config(repeats, deterministic_mode=True))
    with megatron_on_cpu():
        theirs = build_stock(layer.config)
    theirs.load_state_dict(layer.state_dict())
    saved = {local.key: local.data for local in local_tensors([theirs])}
    for local in local_tensors([layer]):
        assert torch.equal(local.data, saved.pop(local.key)), local.key
    assert not saved

    x = torch.randn(2, 70, HIDDEN, requires_grad=True)
    found = run(layer, x)
    with torch.compiler.set_stance("force_eager"):
        expected = run(theirs, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    inputs = {"x": x, **dict(layer.named_parameters())}
    stock_inputs = {"x": x, **dict(theirs.named_parameters())}
    assert_relative(gradients(found, inputs), gradients(expected, stock_inputs), 1e-3)


def described(module: Any) -> tuple[Any, ...]:
    """Parameters with their marks, and everything that a checkpoint would hold."""
    parameters = {
        name: (
            tuple(parameter.shape),
            parameter.dtype,
            *(
                getattr(parameter, mark, None)
                for mark in (
                    "tensor_model_parallel",
                    "partition_dim",
                    "partition_stride",
                    "sequence_parallel",
                    "allreduce",
                )
            ),
        )
        for name, parameter in module.named_parameters()
    }
    prefix, offsets = "decoder.layers.0.self_attention.", ((0, 1, 5),)
    state = module.sharded_state_dict(prefix, offsets)
    tensors = {}
    for name, entry in state.items():
        for one in entry.build() if hasattr(entry, "build") else [entry]:
            fields = vars(one)
            tensors[name, one.key] = {
                field: fields[field] for field in fields if field not in ("data", "flattened_range")
            }
    return parameters, tensors


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_checkpoints_hold_what_megatron_core_puts_there(tp: int, sequence_parallel: bool) -> None:
    layer_config = config(
        # Without, megatron-core's class looks for the kernel of flash-linear-attention.
        deterministic_mode=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
    )
    sizes = ParallelSizes(tp=tp)
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, set[Any]] = {}
    for rank in range(tp):
        with fake_cluster(rank, tp, sizes), torch.device("meta"):
            ours = build(layer_config)
            assert described(ours) == described(build_stock(layer_config))
            for local in local_tensors([ours]):
                shapes[local.key] = local.key_shape
                boxes.setdefault(local.key, set()).add(local.box)

    keys, values = KEY_HEADS * KEY_SIZE, 3 * KEY_HEADS * VALUE_SIZE
    heads = 3 * KEY_HEADS
    assert shapes == {
        "in_proj.weight.query": (keys, HIDDEN),
        "in_proj.weight.key": (keys, HIDDEN),
        "in_proj.weight.value": (values, HIDDEN),
        "in_proj.weight.z": (values, HIDDEN),
        "in_proj.weight.beta": (heads, HIDDEN),
        "in_proj.weight.alpha": (heads, HIDDEN),
        "conv1d.weight.query": (keys, 1, KERNEL),
        "conv1d.weight.key": (keys, 1, KERNEL),
        "conv1d.weight.value": (values, 1, KERNEL),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "out_norm.weight": (VALUE_SIZE,),
        "out_proj.weight": (HIDDEN, values),
    }
    for key, shape in shapes.items():
        assert list(tiling_faults(shape, dict.fromkeys(boxes[key]))) == [], key


@pytest.mark.usefixtures("process_groups")
def test_initial_values() -> None:
    """Those of megatron-core: A uniform between 1 and 16, dt_bias 1."""
    layer = build(config(linear_num_key_heads=60, linear_num_value_heads=120))
    a = layer.A_log.detach().exp()
    assert 1 <= float(a.min()) < 3
    assert 14 < float(a.max()) <= 16.01
    assert torch.equal(layer.dt_bias, torch.ones(120))
    assert not layer.out_norm.weight.any()
    assert float(layer.conv1d.weight.detach().std()) > 0.1


def test_plain_torch_without_a_gpu() -> None:
    assert gated_delta_net_module(config()) is TorchGatedDeltaNet
