"""Two data-parallel ranks, of which one has no picture, trained by megatron-core's own parts.

What overlaps (the reduction of gradients with the backward pass, the gathering of updated
parameters with the next forward pass) changes when, and so must not change what. Without a
gradient of the vision encoder on the one rank, the other would wait for it for ever.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from forked import run_ranks
from oracle import tiny
from oracle.test_gradients import labels_of

STEPS = 3
OVERLAPPED = {"overlap_grad_reduce": True, "bucket_size": 20_000}
SHARDED = {"use_distributed_optimizer": True}
GATHERED = SHARDED | OVERLAPPED | {"overlap_param_gather": True}
# name: (model, fields of DistributedDataParallelConfig, fields of the provider)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("qwen3_vl", {}, {}),
    "gathered": ("qwen3_vl", GATHERED, {}),
    "frozen_reduced": ("qwen3_vl", OVERLAPPED, {"freeze_vision_model": True}),
    "experts": ("qwen3_5_moe-2x_value_heads", SHARDED, {"moe_aux_loss_coeff": 0.0}),
    "experts_gathered": ("qwen3_5_moe-2x_value_heads", GATHERED, {"moe_aux_loss_coeff": 0.0}),
}


def losses_of(
    folder: str, batch: dict[str, Tensor], ddp: dict[str, Any], fields: dict[str, Any]
) -> list[float]:
    """The loss of the global batch at each step."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.params_dtype, provider.bf16 = torch.float32, False
    provider.calculate_per_token_loss = True
    provider.set_fields(fields)
    [model] = provider.provide_distributed_model(DistributedDataParallelConfig(**ddp))
    of_optimizer = {
        name: ddp.get(name, False) for name in ("use_distributed_optimizer", "overlap_param_gather")
    }
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0, **of_optimizer), [model]
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if ddp.get("overlap_grad_reduce"):
        model.config.no_sync_func = model.no_sync
    losses = []

    def of_batch(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        losses.append(output.detach().sum())
        return output.sum(), (batch["labels"] != -100).sum().int(), {}

    def forward_step(_: Any, chunk: Any) -> tuple[Tensor, Any]:
        return chunk(**batch), of_batch

    for _ in range(STEPS):
        model.train()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=batch["input_ids"].shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
    total = torch.stack(losses)
    dist.all_reduce(total)
    destroy_moe_metrics_tracker()  # which is as long as the first model is deep
    parallel_state.destroy_model_parallel()
    found: list[float] = total.tolist()
    return found


def worker(rank: int, folder: str) -> None:
    batch = torch.load(f"{folder}/batch{rank}.pt")
    results = {
        case: losses_of(f"{folder}/{model}", batch, ddp, fields)
        for case, (model, ddp, fields) in CASES.items()
    }
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("data_parallel")
    processor = tiny.build_processor()
    for model in {model for model, _, _ in CASES.values()}:
        tiny.build_hf_model(tiny.build_case(processor, model)).save_pretrained(folder / model)
        processor.save_pretrained(folder / model)
    picture = tiny.prompt(processor, f"A {tiny.IMAGE}: what?", images=tiny.photographs()[:1])
    for rank, batch in enumerate((picture, tiny.prompt(processor, "Only words, and no picture."))):
        torch.save(batch | {"labels": labels_of(batch)}, folder / f"batch{rank}.pt")
    run_ranks(worker, str(folder), seconds=200)
    found: dict[str, list[float]] = torch.load(folder / "results.pt")
    return found


@pytest.mark.parametrize(("one", "other"), [("plain", "gathered"), ("experts", "experts_gathered")])
def test_what_overlaps_changes_no_step(
    results: dict[str, list[float]], one: str, other: str
) -> None:
    assert len(set(results[one])) == STEPS, "nothing is trained"
    assert results[other] == pytest.approx(results[one], rel=1e-5)


def test_parts_without_gradients(results: dict[str, list[float]]) -> None:
    """The mergers still learn, by another step than where the whole encoder does."""
    plain, frozen = results["plain"], results["frozen_reduced"]
    assert frozen[0] == pytest.approx(plain[0], rel=1e-5)
    assert frozen[-1] != pytest.approx(plain[-1], rel=1e-5)
