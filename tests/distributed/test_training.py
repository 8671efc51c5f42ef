"""Training by stock megatron-core in several gloo processes goes as in one.

What test_layout_matrix trains without: options of DistributedDataParallel and of the optimizer,
other dtypes, and checkpoints of both that go on at another layout. All of it is megatron-core's;
the loss and the norm of the gradient are compared at every step. The processes are started once and
run every case; the tests look at what they found.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from forked import run_ranks
from trained_models import Trained, Training, build, forget_layout

WORLD = 2
LENGTH = 112
# A step that is counted wrongly after two of them is seen in the loss of the fourth.
STEPS, STEPS_WITH_CHECKPOINT = 3, 4
Steps = list[tuple[float, ...]]
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = PIPELINE | {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
INTERLEAVED |= {"batch_p2p_comm": False}
EXPERTS = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
ALL_TO_ALL = EXPERTS | {"moe_token_dispatcher_type": "alltoall"}
ALL_GATHER = EXPERTS | {"moe_token_dispatcher_type": "allgather"}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BALANCE = {"moe_aux_loss_coeff": 0.1}
OF_MICROBATCHES = {"calculate_per_token_loss": False}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
FP16 = {"fp16": True, "params_dtype": torch.float16}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 100_000}
IN_FP32 = {"grad_reduce_in_fp32": True}
# Half precision multiplies a difference of one last bit: 7 weights of 3 million that were rounded
# to their neighbours changed the next loss by 1e-4. Gradients of two microbatches have the same sum
# in each order, and the norm, which has not, scales nothing: so all weights stay bit-equal.
UNCLIPPED = {"clip_grad": 1e4}

# In one process, without the distributed optimizer.
REFERENCES = {
    "dense": Training(),
    "pictures": Training(batches="pictures"),
    "experts": Training("experts", BALANCE, optimizer={"lr": 2e-4}),
    # With the loss of tokens, megatron-core weighs the balance by the tokens of each part of the
    # sequence, which hold unequal parts of the padding (moe/router.py:629 of 0.19.2).
    "experts_of_microbatches": Training("experts", BALANCE | OF_MICROBATCHES),
    "of_microbatches": Training(provider=OF_MICROBATCHES),
    "bf16": Training(provider=BF16, ddp=IN_FP32, optimizer=UNCLIPPED, batches="pair"),
    "fp16": Training(
        provider=FP16,
        ddp=IN_FP32,
        optimizer=UNCLIPPED | {"initial_loss_scale": 8.0},
        batches="pair",
    ),
    "clipped": Training(optimizer={"clip_grad": 0.5, "log_num_zeros_in_grad": True}),
}


@dataclass(frozen=True)
class Case:
    """A reference in several processes.

    Attributes:
        reference: one of REFERENCES.
        layout: fields of its provider.
        ddp: fields of its DistributedDataParallelConfig.
        then: the layout that it goes on with after two of the steps, from a checkpoint.
        sharding: of the optimizer in that checkpoint.
        exchanged: each rank loads a part of what it needs, and has the rest from the others.
        within: relative error of loss and norm.
        quick: part of every run of the tests.
    """

    reference: str
    layout: dict[str, Any]
    ddp: dict[str, Any]
    then: dict[str, Any] | None = None
    sharding: str | None = None
    exchanged: bool = False
    within: float = 1e-5
    quick: bool = False


RESHARDABLE = "fully_reshardable"
CASES = {
    "data": Case("dense", {}, {}),
    "data_overlap": Case("pictures", {}, OVERLAP),
    "data_sharded_clipped": Case("clipped", {}, SHARDED),
    "pipeline_of_microbatches": Case("of_microbatches", PIPELINE, {}),
    "interleaved_clipped": Case("clipped", INTERLEAVED, SHARDED, quick=True),
    "all_gather": Case("experts", ALL_GATHER, {}),
    "bf16": Case("bf16", {}, SHARDED | IN_FP32, within=1e-6),
    "fp16": Case("fp16", {}, IN_FP32, within=1e-6),
    "to_pipeline": Case("dense", SEQUENCE, SHARDED, PIPELINE, RESHARDABLE, quick=True),
    # Gradients are summed in another order. After some steps a weight is rounded to its neighbour.
    "from_pipeline_bf16": Case("bf16", PIPELINE, SHARDED | IN_FP32, {}, RESHARDABLE, within=1e-3),
    "to_itself": Case("dense", {}, SHARDED, {}, "dp_reshardable"),
    "to_itself_fp32": Case("dense", {}, {}, {}),
    "to_itself_bf16": Case("bf16", {}, IN_FP32, {}, within=1e-6),
    "experts_to_sequence": Case(
        "experts_of_microbatches", ALL_TO_ALL, SHARDED, ALL_TO_ALL | SEQUENCE, RESHARDABLE
    ),
    "exchanged": Case("dense", {}, SHARDED, {}, RESHARDABLE, exchanged=True),
}


def of_process(case: Case, layout: dict[str, Any]) -> Training:
    reference = REFERENCES[case.reference]
    return replace(reference, provider=reference.provider | layout, ddp=case.ddp)


def run_case(case: Case, folder: Path, batches: dict[str, Any]) -> Steps:
    training = of_process(case, case.layout)
    mine = batches[training.batches]
    forget_layout()
    trained = build(training, folder)
    if case.then is None:
        return trained.steps(STEPS, mine)
    found = trained.steps(2, mine)
    save(trained, case, folder / "checkpoint")
    forget_layout()
    trained = build(of_process(case, case.then), folder, filled=False)
    load(trained, case, folder / "checkpoint")
    return found + trained.steps(STEPS_WITH_CHECKPOINT - 2, mine)


def save(trained: Trained, case: Case, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(trained.sharded_state_dict(case.sharding), str(folder))


def load(trained: Trained, case: Case, folder: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )

    strategy = None
    if case.exchanged:
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
    state = trained.sharded_state_dict(case.sharding, is_loading=True)
    trained.load_state_dict(dist_checkpointing.load(state, str(folder), strategy))


def worker(rank: int, folder: str, cases: list[str]) -> None:
    batches = torch.load(f"{folder}/batches.pt")
    found = {name: run_case(CASES[name], Path(folder), batches) for name in cases}
    torch.save(found, f"{folder}/found{rank}.pt")


def microbatches(folder: Path, *, with_picture: tuple[bool, ...]) -> list[dict[str, Tensor]]:
    """Samples of the same length, with their labels."""
    import transformers

    from oracle import tiny

    processor = transformers.AutoProcessor.from_pretrained(folder)
    found = []
    for index, picture in enumerate(with_picture):
        text = f"Sample {index} {tiny.IMAGE if picture else 'x' * 40} says {'abcdefg'[index:]}"
        images = {"images": [tiny.photographs()[index % 2]]} if picture else {}
        sizes = {"padding": "max_length", "max_length": LENGTH, "padding_side": "right"}
        batch = dict(processor(text=[text], return_tensors="pt", **images, **sizes))
        batch.pop("token_type_ids", None)
        labels = batch["input_ids"].roll(-1, dims=1)
        labels[(batch["mm_token_type_ids"] != 0) | (batch["attention_mask"] == 0)] = -100
        found.append(batch | {"labels": labels})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and batches."""
    from megatron.bridge.synthetic import make_model

    folder = tmp_path_factory.mktemp("training")
    sizes = {"text.num_hidden_layers": 8, "dtype": "float32"}
    make_model("qwen3-vl", folder / "dense", sizes, seed=3)
    make_model("qwen3-vl-moe", folder / "experts", sizes | {"text.num_experts": 6}, seed=4)
    batches = {
        "mixed": microbatches(folder / "dense", with_picture=(True, False, True, False)),
        "pair": microbatches(folder / "dense", with_picture=(True, False)),
        "pictures": microbatches(folder / "dense", with_picture=(True, True, True, True)),
    }
    torch.save(batches, folder / "batches.pt")
    return folder


QUICK = [name for name, case in CASES.items() if case.quick]
SLOW = [name for name, case in CASES.items() if not case.quick]


@pytest.fixture(scope="module")
def quick(folder: Path) -> dict[str, list[Steps]]:
    """What one process found, and what each of several, case by case."""
    return run_cases(folder, QUICK)


@pytest.fixture(scope="module")
def slow(folder: Path) -> dict[str, list[Steps]]:
    """The same of the other cases."""
    return run_cases(folder, SLOW)


def run_cases(folder: Path, names: list[str]) -> dict[str, list[Steps]]:
    from megatron.bridge.runtime.parallel import destroy_process_groups

    batches = torch.load(folder / "batches.pt")
    expected = {}
    for name in dict.fromkeys(CASES[name].reference for name in names):
        trained = build(REFERENCES[name], folder)
        expected[name] = trained.steps(STEPS_WITH_CHECKPOINT, batches[REFERENCES[name].batches])
        forget_layout()
    destroy_process_groups()
    run_ranks(worker, str(folder), names, world=WORLD, seconds=600)
    ranks = [torch.load(folder / f"found{rank}.pt") for rank in range(WORLD)]
    return {
        name: [expected[CASES[name].reference], *(found[name] for found in ranks)] for name in names
    }


@pytest.mark.parametrize("case", QUICK)
def test_goes_as_in_one_process(quick: dict[str, list[Steps]], case: str) -> None:
    check(quick[case], CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_goes_as_in_one_process_too(slow: dict[str, list[Steps]], case: str) -> None:
    check(slow[case], CASES[case])


def check(found: list[Steps], case: Case) -> None:
    expected, *of_ranks = found
    number = STEPS if case.then is None else STEPS_WITH_CHECKPOINT
    assert expected[number - 1][0] < 0.9 * expected[0][0], "the steps have taught nothing"
    for steps in of_ranks:
        assert steps == [pytest.approx(step, rel=case.within) for step in expected[:number]]
