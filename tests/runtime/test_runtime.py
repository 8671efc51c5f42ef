"""megatron-core on the CPU, and its process groups."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

import forked
from megatron.bridge.errors import ConfigError
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.runtime.device_names import functions_that_name_the_gpu
from megatron.bridge.runtime.parallel import (
    fake_cluster,
    initialize_process_groups,
)
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from providers import one_process

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


def test_context_restores_torch_and_is_reentrant() -> None:
    original = torch.cuda.current_device
    with megatron_on_cpu():
        patched = torch.cuda.current_device
        with pytest.raises(ZeroDivisionError), megatron_on_cpu():
            raise ZeroDivisionError
        assert torch.cuda.current_device is patched
        assert torch.cuda.current_device() == torch.device("cpu")
        with torch.device("meta"):
            assert torch.cuda.current_device() == torch.device("meta")
    if torch.cuda.current_device is not patched:  # another test may have activated it for good
        assert torch.cuda.current_device is original


def test_nothing_is_compiled() -> None:
    """There may be no C++ compiler, and the small functions of megatron-core need none."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with megatron_on_cpu():
        assert double(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert compiled == []


def test_random_states_are_tracked_on_the_cpu() -> None:
    with one_process(), megatron_on_cpu():
        tracker = tensor_parallel.get_cuda_rng_tracker()
        torch.manual_seed(5)
        expected = torch.rand(3), torch.rand(3)
        torch.manual_seed(5)
        before = torch.rand(3)
        with tracker.fork():
            first = torch.rand(3)
        with tracker.fork():
            second = torch.rand(3)
        after = torch.rand(3)
    assert torch.equal(before, expected[0])
    assert torch.equal(after, expected[1]), "a fork must not move the outer state"
    assert not torch.equal(first, second), "a fork continues where the last one stopped"


def test_fake_cluster_is_any_rank_and_leaves_nothing() -> None:
    sizes = ParallelSizes(tp=4, pp=2)
    with fake_cluster(rank=13, world_size=16, sizes=sizes):
        assert parallel_state.get_tensor_model_parallel_rank() == 13 % 4
        assert parallel_state.get_pipeline_model_parallel_rank() == 13 // 8
        assert parallel_state.get_data_parallel_world_size() == 2
        with (
            pytest.raises(ConfigError, match="without process groups"),
            fake_cluster(0, 1, ParallelSizes()),
        ):
            pass
        assert ParallelSizes.current().differences(sizes) == []
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_world_that_does_not_fit() -> None:
    sizes = ParallelSizes(tp=3)
    with (
        pytest.raises(ConfigError, match="multiple of 3 processes, and there are 4"),
        fake_cluster(0, 4, sizes),
    ):
        pass
    assert not dist.is_initialized()
    with (
        one_process(),
        pytest.raises(ConfigError, match=r"tensor_model_parallel_size is 3, .* made for 1"),
    ):
        initialize_process_groups(sizes)


def test_functions_that_name_the_gpu_name_the_cpu_inside_only() -> None:
    done = forked.run(compare_constants)  # another test may have activated it here for good
    assert done.returncode == 0, done.stderr


def compare_constants() -> None:
    from megatron.core.transformer.utils import get_default_causal_mask

    functions = [*functions_that_name_the_gpu()]
    outside = [function.__code__ for function in functions]
    with megatron_on_cpu():
        assert get_default_causal_mask(2).tolist() == [[False, True], [False, False]]
        for function, code in zip(functions, outside, strict=True):
            assert function.__code__.co_consts != code.co_consts, function.__qualname__
    assert [function.__code__ for function in functions] == outside


def test_a_batch_is_broadcast_on_the_cpu() -> None:
    batch = {"tokens": torch.arange(6).view(2, 3)}
    with one_process(), megatron_on_cpu():
        found = tensor_parallel.broadcast_data(["tokens"], batch, torch.int64)
    assert torch.equal(found["tokens"], batch["tokens"])


def test_tokens_in_the_order_of_the_experts_are_not_copied() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    before = token_dispatcher.sort_chunks_by_idxs
    tokens, probs = torch.randn(7, 3), torch.rand(7)
    counts = torch.tensor([2, 0, 4, 1])
    with megatron_on_cpu():
        sort = token_dispatcher.sort_chunks_by_idxs
        same = sort(tokens, counts, torch.arange(4), probs=probs)
        turned = torch.tensor([3, 0, 1, 2])
        other = sort(tokens, counts, turned, probs=probs)
    assert same[0] is tokens
    assert same[1] is probs
    expected = before(tokens, counts, turned, probs=probs)
    assert all(map(torch.equal, other, expected))
    assert not torch.equal(other[0], tokens)
    assert token_dispatcher.sort_chunks_by_idxs is before
