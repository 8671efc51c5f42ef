"""What `plan` says of each rank, against megatron-core: every rank of small clusters is built."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.errors import PlanError
from megatron.bridge.live.local_tensors import local_tensors
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.operations.inspection.cluster_layout import (
    Blueprint,
    configured,
    lay_out,
    on_rank,
    without_advice,
)
from megatron.bridge.operations.inspection.cluster_legality import REFUSED, layout_error
from megatron.bridge.operations.inspection.rank_grid import rank_positions
from megatron.bridge.operations.inspection.rank_share import adam_bytes, share_of
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.tensors.boxes import volume
from providers import small_provider

_BF16 = {"params_dtype": torch.bfloat16, "bf16": True}
_MOE = {
    "num_moe_experts": 12,
    "num_layers": 8,
    "num_attention_heads": 8,
    "ssm_dtype": torch.float32,
}


_ARCHITECTURES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}


def planned(family: str, **fields: Any) -> Blueprint:
    make = partial(small_provider, family, **_BF16, **fields)
    return Blueprint(bridge_for(_ARCHITECTURES[family]), make)


CASES_OF_RANKS = [
    ("qwen3_vl", {}, ParallelSizes()),
    ("qwen3_vl", {}, ParallelSizes(tp=2, world_size=6)),
    ("qwen3_vl", {"share_embeddings_and_output_weights": True, "num_layers": 6},
     ParallelSizes(pp=2, world_size=4)),
    ("qwen3_vl_moe", _MOE, ParallelSizes(tp=2, ep=2)),
    ("qwen3_vl_moe", _MOE, ParallelSizes(tp=2, pp=2, ep=3, etp=1, world_size=24)),
    ("qwen3_5", {"num_layers": 8, "mtp_num_layers": 1}, ParallelSizes(tp=2, pp=4, vpp=2)),
    ("qwen3_5_moe", _MOE | {"mtp_num_layers": 1}, ParallelSizes(pp=2, ep=2, etp=2, world_size=8)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "request_"), CASES_OF_RANKS, ids=str)
def test_every_rank_holds_what_is_said_of_its_stage(
    family: str, fields: dict[str, Any], request_: ParallelSizes
) -> None:
    """Weights and names as built; gradients as megatron-core's own DDP allocates them."""
    model = planned(family, **fields)
    layout = lay_out(model, request_)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    holders: Counter[object] = Counter()
    held: dict[int, list[object]] = {}
    sizes: dict[str, int] = {}
    for position in layout.positions:
        share = layout.stages[position.pp]
        with without_advice(), on_rank(position.rank, request_):
            provider = configured(model, request_)
            stages = [None] if request_.vpp is None else range(request_.vpp)
            chunks = [provider.provide(vp_stage=stage) for stage in stages]
            assert share_of(chunks, model.bridge) == share
            locals_ = local_tensors(chunks)
            wrapped = [DistributedDataParallel(provider, ddp, chunk) for chunk in chunks]
        buffers = [buffer for one in wrapped for buffer in one.buffers]
        experts = [buffer for one in wrapped for buffer in one.expert_parallel_buffers]
        assert sum(buffer.grad_data.nbytes for buffer in buffers + experts) == share.gradient_bytes
        assert share.optimizer_bytes == sum(
            buffer.grad_data.numel() // buffer.data_parallel_group.size()
            * adam_bytes(buffer.param_dtype)
            for buffer in buffers + experts
        )  # fmt: skip
        held[position.rank] = [(local.key, local.box) for local in locals_]
        holders.update(set(held[position.rank]))
        sizes |= {local.key: prod(local.key_shape) for local in locals_}
    # Each box counted once, however many ranks hold it: together the ranks hold the whole model.
    once = Counter[str]()
    for boxes in held.values():
        for key, box in set(boxes):
            once[key] += volume(box) / holders[key, box]
    assert {key: round(number) for key, number in once.items()} == sizes
    for position in layout.positions:
        boxes = held[position.rank]
        assert sum(volume(box) for _, box in boxes) == layout.stages[position.pp].parameters


def test_the_ranks_hold_the_planned_model() -> None:
    """Counted once, the parameters of all ranks are those of the checkpoint that import writes."""
    config = copy.deepcopy(released.QWEN3_VL_30B_A3B) | {"dtype": "bfloat16"}
    config["text_config"] |= {"num_hidden_layers": 3, "num_experts": 10}
    bridge = AutoBridge.from_hf_config(config)
    request_ = ParallelSizes(tp=2, ep=2, etp=1)
    make = partial(bridge.to_megatron_provider, load_weights=False)
    model = Blueprint(bridge.model_bridge, make)
    layout = lay_out(model, request_)
    found: dict[tuple[str, object], int] = {}
    for position in layout.positions:
        with without_advice(), on_rank(position.rank, request_):
            provider = configured(model, request_)
            for local in local_tensors([provider.provide()]):
                found[local.key, local.box] = volume(local.box)
    plan = bridge.plan(PlanOptions(provider.padded_vocab_size))
    assert sum(found.values()) == sum(prod(spec.shape) for spec in plan.megatron.values())


@pytest.mark.parametrize(
    "request_",
    [
        ParallelSizes(tp=2, pp=3, cp=2, ep=2, etp=4, world_size=48),
        ParallelSizes(tp=3, pp=2, ep=5),
        ParallelSizes(tp=4, ep=2, etp=1, world_size=16),
    ],
    ids=str,
)
def test_positions_are_those_of_the_parallel_state(request_: ParallelSizes) -> None:
    positions = rank_positions(request_)
    assert [position.rank for position in positions] == list(range(request_.ranks))
    for position in positions:
        with on_rank(position.rank, request_):
            assert (
                position.tp,
                position.cp,
                position.dp,
                position.pp,
                position.ep,
                position.etp,
                position.edp,
            ) == (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_expert_model_parallel_rank(),
                parallel_state.get_expert_tensor_parallel_rank(),
                parallel_state.get_expert_data_parallel_rank(),
            )


def test_context_parallel_ranks_share_the_optimizer_too() -> None:
    """Of any module."""
    bytes_of = []
    for request_ in (ParallelSizes(), ParallelSizes(cp=2, world_size=6)):
        with on_rank(0, request_):
            module = torch.nn.Sequential(torch.nn.Linear(384, 24, bias=False))
            bytes_of.append(share_of([module], bridge_for(_ARCHITECTURES["qwen3_vl"])))
    one, six = bytes_of
    assert one.parameters == six.parameters == 384 * 24
    assert one.optimizer_bytes == 6 * six.optimizer_bytes == 384 * 24 * 8
    assert one.gradient_bytes == six.gradient_bytes


# --- what is illegal ---


def problems(model: Blueprint, request_: ParallelSizes, **more: Any) -> tuple[str, ...]:
    with pytest.raises(REFUSED) as refused:
        lay_out(model, request_)
    error = layout_error(model, request_, refused.value, more)  # type: ignore[arg-type]
    assert isinstance(error, PlanError)
    return error.problems


ILLEGAL = [
    ("qwen3_vl", {"num_attention_heads": 6}, ParallelSizes(tp=4), "vision.num_heads is 6", "2"),
    ("qwen3_vl", {}, ParallelSizes(pp=4), "num_layers=5 should be divisible", "1 or 5"),
    ("qwen3_vl", {"num_layers": 6}, ParallelSizes(pp=5), "should be divisible", "3 or 6"),
    ("qwen3_5", {"mtp_num_layers": 1}, ParallelSizes(cp=2), "with mtp_num_layers = 1", "1"),
    ("qwen3_vl", {}, ParallelSizes(ep=2), "num_moe_experts must be non None", "1"),
    ("qwen3_vl", {}, ParallelSizes(vpp=2), "interleaving needs more than 2 stages", None),
    ("qwen3_5", {"num_layers": 12}, ParallelSizes(pp=3, vpp=3), "should be divisible", "2 or 4"),
    ("qwen3_vl_moe", _MOE, ParallelSizes(ep=5), "num_moe_experts is 12, not a multiple", "4 or 6"),
    ("qwen3_vl_moe", _MOE, ParallelSizes(etp=6), "moe_ffn_hidden_size is 28, not a", "4 or 7"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "request_", "why", "nearest"), ILLEGAL, ids=str)
def test_an_illegal_size_and_the_nearest_legal_ones(
    family: str, fields: dict[str, Any], request_: ParallelSizes, why: str, nearest: str | None
) -> None:
    model = planned(family, **fields)
    [problem] = problems(model, request_)
    option = list(request_.given())[-1]
    assert problem.startswith(f"--{option} {getattr(request_, option)}: ")
    assert why in problem
    assert problem.endswith(f"(the nearest legal: {nearest})" if nearest else "(legal without it)")
    for size in [] if nearest is None else nearest.split(" or "):
        lay_out(model, request_.with_size(option, int(size)))


def test_all_illegal_sizes_are_told_at_once() -> None:
    request_ = ParallelSizes(tp=5, pp=3, ep=7, world_size=50)
    tp, pp, ep, world = problems(planned("qwen3_vl_moe", **_MOE), request_)
    assert tp.startswith("--tp 5: ")
    assert pp.startswith("--pp 3: ")
    assert ep.startswith("--ep 7: ")
    assert world == (
        "--world-size 50: not a multiple of what is needed: 4 ranks hold the model (tp x pp x cp), "
        "24 its experts (etp x ep x pp) (with --tp 2, with --pp 2, with --ep 6, the nearest legal: "
        "48 or 72)"
    )


def test_an_mtp_layer_that_is_in_the_way() -> None:
    model, without = planned("qwen3_5", mtp_num_layers=1), planned("qwen3_5")
    [problem] = problems(model, ParallelSizes(cp=2), mtp=without)
    assert problem.endswith("(the nearest legal: 1); legal without the MTP layer: --without mtp")
    heads = without.make().linear_num_key_heads
    [problem] = problems(model, ParallelSizes(cp=heads + 1), mtp=without)
    assert "--without mtp" not in problem


@pytest.mark.parametrize("world_size", [3, 5])
def test_a_world_size_that_does_not_fit(world_size: int) -> None:
    request_ = ParallelSizes(tp=2, world_size=world_size)
    [problem] = problems(planned("qwen3_vl"), request_)
    assert problem == (
        f"--world-size {world_size}: not a multiple of what is needed: 2 ranks hold the model "
        f"(tp x pp x cp) (the nearest legal: {world_size - 1} or {world_size + 1})"
    )
