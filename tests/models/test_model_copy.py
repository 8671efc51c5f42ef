"""copy.deepcopy of a model: a reference for reinforcement learning, an average of weights."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.bridge.runtime.parallel import fake_cluster
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from providers import PROVIDERS, one_process, small_provider

pytestmark = pytest.mark.usefixtures("on_the_gpu")

FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"share_embeddings_and_output_weights": True},
    "qwen3_5_moe": {"mtp_num_layers": 1},
}
TOKENS = torch.arange(22).reshape(2, 11)


@pytest.mark.parametrize("family", PROVIDERS)
def test_how_parameters_are_split_is_kept(family: str) -> None:
    """megatron-core notes on a parameter how it is split: sharding and gradients go by that."""
    provider = small_provider(family, tensor_model_parallel_size=2, sequence_parallel=True)
    with fake_cluster(1, 2, ParallelSizes(tp=2)), torch.device("meta"):
        model = provider.provide()
        copied = copy.deepcopy(model)
        assert copied.pg_collection.tp is model.pg_collection.tp
        split = 0
        for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
            assert vars(ours) == vars(theirs)
            split += getattr(ours, "partition_dim", -1) >= 0
        assert split > 20
        assert copied.sharded_state_dict().keys() == model.sharded_state_dict().keys()


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


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("family", PROVIDERS)
def test_a_copy_is_equal_and_independent(family: str) -> None:
    """Also of a model in training, inside of DistributedDataParallel."""
    provider = small_provider(family, **FIELDS.get(family, {}))
    [wrapped] = provider.provide_distributed_model()
    model = wrapped.module.train()
    model(input_ids=TOKENS, labels=TOKENS).sum().backward()  # leaves its traces
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    assert copied.training
    assert copied.config is not model.config
    assert copied.language_model.decoder.config is copied.config
    assert copied.pg_collection.tp is model.pg_collection.tp

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for name, tensor in {
        **dict(copied.named_parameters()),
        **dict(copied.named_buffers()),
    }.items():
        assert torch.equal(tensor, tensors.pop(name))
        assert tensor.grad is None
        assert tensor.untyped_storage().data_ptr() not in storages, name
    assert not tensors

    with torch.no_grad():
        before = model.eval()(input_ids=TOKENS)
        assert torch.equal(copied.eval()(input_ids=TOKENS), before)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(copied(input_ids=TOKENS), before)
        assert not torch.equal(model(input_ids=TOKENS), before)
    copied.train()(input_ids=TOKENS, labels=TOKENS).sum().backward()
    assert all(p.grad is not None for p in copied.language_model.parameters())


@pytest.mark.usefixtures("process")
def test_tied_weights_stay_tied() -> None:
    provider = small_provider(share_embeddings_and_output_weights=True)
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    copied = copy.deepcopy(model)
    shared = copied.shared_embedding_or_output_weight()
    assert shared is copied.language_model.embedding.word_embeddings.weight
    assert shared is not model.shared_embedding_or_output_weight()
