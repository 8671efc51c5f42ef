"""Gated DeltaNet in two gloo processes against one: heads, and the sequence, split over them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from forked import run_ranks
from gated_delta_layers import HIDDEN, config, random_layer
from megatron.bridge.live.local_tensors import local_tensors
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.runtime.parallel import (
    destroy_process_groups,
    initialize_process_groups,
)
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.boxes import slices

WORLD = 2
LENGTH, BATCH = 70, 3
# case: (what limits the sequences, sequence parallelism)
CASES = {
    "tensor": ("mask", False),
    "sequence": ("mask", True),
    "tensor_packed": ("packed", False),
    "sequence_packed": ("packed", True),
}


def arguments(limit: str) -> dict[str, Any]:
    if limit == "packed":
        boundaries = torch.tensor([0, 3, 67, LENGTH], dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries
        )
        return {"attention_mask": None, "packed_seq_params": packed}
    padding = torch.arange(LENGTH) < torch.tensor([[30], [0], [1]])
    return {"attention_mask": padding[:, None, None, :]}


def train_step(
    weights: dict[str, Tensor] | None, case: str, tp: int, rank: int
) -> tuple[dict[str, Tensor], list[Any], Tensor, Tensor]:
    """Weights by checkpoint key, gradients with their boxes, output, gradient of the input."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    limit, sequence_parallel = CASES[case]
    split = sequence_parallel and tp > 1
    initialize_process_groups(ParallelSizes(tp=tp))
    layer = random_layer(config(tensor_model_parallel_size=tp, sequence_parallel=split))
    with torch.no_grad():
        tensors = local_tensors([layer])
        if weights is None:
            weights = {local.key: local.data.clone() for local in tensors}
        for local in tensors:
            local.data.copy_(weights[local.key][slices(local.box)])

    generator = torch.Generator().manual_seed(5)
    batch = 1 if limit == "packed" else BATCH
    x, wanted = torch.randn(2, LENGTH, batch, HIDDEN, generator=generator)
    if split:
        x, wanted = x.chunk(WORLD)[rank].clone(), wanted.chunk(WORLD)[rank]
    x.requires_grad_()
    with megatron_on_cpu():
        model = DistributedDataParallel(layer.config, DistributedDataParallelConfig(), layer)
        model.zero_grad_buffer()
        output, _ = model(x, **arguments(limit))
        output.backward(wanted)
        finalize_model_grads([model])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.main_grad)
        held = local_tensors([layer])
        gradients = [(local.key, local.box, local.data.clone()) for local in held]
    return weights, gradients, output.detach(), x.grad


def worker(rank: int, folder: str) -> None:
    from megatron.core import parallel_state

    results = {}
    for case in CASES:
        weights = torch.load(f"{folder}/{case}.pt")
        results[case] = train_step(weights, case, WORLD, rank)[1:]
        parallel_state.destroy_model_parallel()
    torch.save(results, f"{folder}/results{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Any]]:
    """What one process finds, and what each of two finds."""
    folder: Path = tmp_path_factory.mktemp("gated_delta_net")
    single = {}
    for case in CASES:
        weights, *single[case] = train_step(None, case, 1, 0)
        torch.save(weights, folder / f"{case}.pt")
        destroy_process_groups()
    run_ranks(worker, str(folder), world=WORLD)
    return single, [torch.load(folder / f"results{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_outputs(results: tuple[dict[str, Any], list[Any]], case: str) -> None:
    single, ranks = results
    for index in (1, 2):
        whole, parts = single[case][index], [rank[case][index] for rank in ranks]
        for found in [torch.cat(parts)] if CASES[case][1] else parts:
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients(results: tuple[dict[str, Any], list[Any]], case: str) -> None:
    """Reduced by megatron-core's finalize_model_grads, as in training."""
    single, ranks = results
    expected = {key: gradient for key, _, gradient in single[case][0]}
    assert len(expected) == 13
    for rank in ranks:
        assert {key for key, _, _ in rank[case][0]} == expected.keys()
        for key, box, found in rank[case][0]:
            part = expected[key][slices(box)]
            assert float((found - part).norm()) <= 1e-4 * float(part.norm()), key
