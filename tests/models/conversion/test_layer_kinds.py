"""Decoders whose layers are not alike: checkpoint keys of each kind, and multi-token prediction."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron.bridge.runtime.parallel import fake_cluster
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from providers import one_process, small_provider

pytestmark = pytest.mark.usefixtures("on_the_gpu")

ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
}
GATED_DELTA_NET = {
    "self_attention.in_proj.layer_norm_weight",
    *(
        f"self_attention.in_proj.weight.{part}"
        for part in ("query", "key", "value", "z", "beta", "alpha")
    ),
    *(f"self_attention.conv1d.weight.{part}" for part in ("query", "key", "value")),
    "self_attention.A_log",
    "self_attention.dt_bias",
    "self_attention.out_norm.weight",
    "self_attention.out_proj.weight",
}
DENSE = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
EXPERTS = {
    # No backend fuses this norm with what follows it.
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
}
SHARED_EXPERT = {
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_experts.gate_weight",
}


def checkpoint_keys(family: str, **fields: Any) -> set[str]:
    """Keys of the tensors of decoder layers and predictors."""
    with fake_cluster(0, 1, ParallelSizes()), torch.device("meta"):
        model = small_provider(family, **fields).provide()
        entries = list(nested_values(model.sharded_state_dict()))
    found = set()
    for entry in entries:
        parts = nested_values(entry.build()) if hasattr(entry, "build") else [entry]
        for part in parts:
            name = part.key.removeprefix("language_model.").removeprefix("decoder.")
            if name.startswith(("layers.", "mtp.")) and not isinstance(part, ShardedObject):
                found.add(name)
    return found


def layers(*kinds: set[str]) -> set[str]:
    return {f"layers.{number}.{key}" for number, kind in enumerate(kinds) for key in kind}


def test_layers_with_experts_are_stacked_where_all_have_them() -> None:
    assert checkpoint_keys("qwen3_vl_moe") == {f"layers.{key}" for key in ATTENTION | EXPERTS}


def test_dense_layers_among_those_with_experts() -> None:
    found = checkpoint_keys("qwen3_vl_moe", num_layers=3, moe_layer_freq=[1, 0, 1])
    assert found == layers(ATTENTION | EXPERTS, ATTENTION | DENSE, ATTENTION | EXPERTS)


@pytest.mark.parametrize("frequency", [4, [1, 1, 1, 0, 1]])
def test_hybrid_layers(frequency: Any) -> None:
    linear = GATED_DELTA_NET | DENSE
    found = checkpoint_keys("qwen3_5", linear_attention_freq=frequency)
    assert found == layers(linear, linear, linear, ATTENTION | DENSE, linear)


def test_hybrid_layers_with_experts_and_a_predictor() -> None:
    mlp = EXPERTS | SHARED_EXPERT
    fields = {"num_layers": 2, "linear_attention_freq": [0, 1], "mtp_num_layers": 1}
    # Checkpoints keep the older name of `mtp_model_layer`.
    predictor = {f"mtp.layers.0.transformer_layer.{key}" for key in ATTENTION | mlp} | {
        f"mtp.layers.0.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "final_layernorm")
    }
    found = checkpoint_keys("qwen3_5_moe", **fields)
    assert found == layers(ATTENTION | mlp, GATED_DELTA_NET | mlp) | predictor


def test_layers_of_each_pipeline_stage() -> None:
    """The kind of a layer follows its number in the whole model."""
    sizes = ParallelSizes(pp=2)
    kinds = []
    for rank in range(2):
        with fake_cluster(rank, 2, sizes), torch.device("meta"):
            provider = small_provider("qwen3_5", num_layers=6, pipeline_model_parallel_size=2)
            decoder = provider.provide().language_model.decoder
            kinds += [type(layer.self_attention).__name__ for layer in decoder.layers]
    assert [kind.endswith("SelfAttention") for kind in kinds] == [False] * 3 + [True] + [False] * 2


def test_dtype_of_what_is_released_in_fp32() -> None:
    fields = {"params_dtype": torch.bfloat16, "bf16": True, "ssm_dtype": torch.float32}
    with fake_cluster(0, 1, ParallelSizes()), torch.device("meta"):
        model = small_provider("qwen3_5", **fields).provide()
    wide = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert {name.partition("self_attention.")[2] for name in wide} == {"A_log", "out_norm.weight"}


@pytest.fixture(scope="module")
def process() -> Iterator[None]:
    with one_process():
        yield


def predictions_and_loss(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    predictor = model.language_model.mtp.layers[0]
    hook = predictor.register_forward_hook(lambda _, args, output: found.append(output[0]))
    loss = model(**inputs)
    hook.remove()
    return found[0], loss


@pytest.mark.usefixtures("process")
def test_predictor_on_another_stage_than_the_pictures() -> None:
    provider = small_provider("qwen3_5", mtp_num_layers=1)
    [whole] = provider.provide_distributed_model(wrap_with_ddp=False)
    last = provider.provide(pre_process=False, post_process=True).eval()
    last.load_state_dict(
        {name: weight for name, weight in whole.state_dict().items() if "vision_model" not in name}
    )
    tokens = torch.randint(0, 299, (2, 9))
    inputs = {"input_ids": tokens, "labels": tokens.roll(-1, 1)}
    expected, expected_loss = predictions_and_loss(whole.eval(), **inputs)
    last.set_input_tensor(whole.language_model.embedding(tokens, None))
    found, loss = predictions_and_loss(last, **inputs)
    # What follows the last token is another vector in each, and means nothing.
    torch.testing.assert_close(found[:-1], expected[:-1])
    torch.testing.assert_close(loss, expected_loss)


@pytest.mark.usefixtures("process")
def test_tokens_without_a_label_do_not_count_in_the_mean_of_the_second_loss() -> None:
    [model] = small_provider("qwen3_5", mtp_num_layers=1).provide_distributed_model(
        wrap_with_ddp=False
    )
    tokens = torch.randint(0, 299, (1, 12))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    few = labels.clone()
    few[:, :8] = -100

    def gradient(labels: torch.Tensor, loss_mask: torch.Tensor | None = None) -> torch.Tensor:
        model.zero_grad()
        # The first loss is weighed by 0: what is left is the mean of the second.
        (model(input_ids=tokens, labels=labels, loss_mask=loss_mask) * 0).sum().backward()
        return model.language_model.mtp.layers[0].eh_proj.weight.grad.clone()

    mask = torch.zeros(1, 12)
    mask[:, 8:] = 1
    assert gradient(few).norm() > 0
    torch.testing.assert_close(gradient(few), gradient(labels, mask))


@pytest.mark.usefixtures("process")
def test_without_labels_the_tokens_are_labels_but_neither_padding_nor_pictures() -> None:
    """Training with a loss outside of the model, as for reinforcement learning."""
    [model] = small_provider("qwen3_5", mtp_num_layers=1).provide_distributed_model(
        wrap_with_ddp=False
    )
    tokens = torch.tensor([[1, 302, *[300] * 6, 303, 5, 6, 7, 8, 9, 0, 0]])
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.tensor([[1] * 14 + [0] * 2]),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values": torch.randn(24, 1536),
    }

    def gradient(**labels: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (model(**inputs, **labels) * 0).sum().backward()
        return model.language_model.mtp.layers[0].eh_proj.weight.grad.clone()

    labels = tokens.roll(-1, 1)
    labels[labels == 300] = -100
    labels[:, 13:] = -100
    assert gradient(labels=labels).norm() > 0
    torch.testing.assert_close(gradient(), gradient(labels=labels))
