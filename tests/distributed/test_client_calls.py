"""The calls of clients in two gloo processes: tensor, pipeline and expert parallelism.

The processes are started once and run every case; the tests look at what they found.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from client_models import DENSE, EXPERTS, make_models, put_value_head
from forked import run_ranks

TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "TP2": (DENSE, TENSOR),
    "TP2, experts": (EXPERTS, TENSOR | {"sequence_parallel": True}),
    "PP2": (EXPERTS, PIPELINE | {"num_layers_in_first_pipeline_stage": 3}),
    "EP2": (EXPERTS, {"expert_model_parallel_size": 2}),
    "DP2": (DENSE, {}),
}


@contextmanager
def parallel_state_of(provider: Any) -> Iterator[None]:
    from megatron.core import parallel_state

    provider.initialize_model_parallel(seed=3, seed_kwargs={})
    yield
    parallel_state.destroy_model_parallel()


def by_task(bridge: Any, model: Any) -> dict[str, Any]:
    """What the tasks say, and where their rows and the loader disagree."""
    tasks = bridge.get_conversion_tasks(model)
    read = bridge.hf_pretrained.state.__getitem__
    wrong = []
    for task in tasks:
        if task.param_weight is None:
            continue
        mapping, module = task.mapping, task.megatron_module
        files = {role: read(name) for role, name in mapping.hf_params.items()}
        given = files["hf"] if set(files) == {"hf"} else files
        if not torch.equal(mapping.hf_to_megatron(given, module), task.param_weight):
            wrong.append(f"{task.global_param_name} from files")
        for name, tensor in mapping.megatron_to_hf(task.param_weight, module).items():
            expected = read(name)
            if mapping.is_grouped_export:
                expected = expected[mapping.expert]
            if not torch.equal(tensor, expected):
                wrong.append(f"{task.global_param_name} to {name}")
    rows = [task.mapping for task in tasks]
    return {
        "names": [task.global_param_name for task in tasks],
        "local": {
            task.global_param_name: task.param_name
            for task in tasks
            if task.param_weight is not None
        },
        "owners": [(task.pp_rank, task.vp_stage) for task in tasks],
        "sizes": {(row.is_expert, row.tp_size, row.ep_size) for row in rows},
        "wrong": wrong,
    }


def refused(call: Any) -> str:
    from megatron.bridge.errors import BridgeError

    try:
        call()
    except BridgeError as error:
        return str(error)
    return "not refused"


def worker(rank: int, folder: str) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron.bridge import AutoBridge

    found: dict[str, Any] = {}
    for case, (family, sizes) in CASES.items():
        bridge = AutoBridge.from_hf_pretrained(Path(folder, family))
        provider: Any = bridge.to_megatron_provider(load_weights=False)
        provider.apply_overrides_and_finalize(dtype=torch.bfloat16, overrides=sizes)
        with parallel_state_of(provider):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            model = provider.provide_distributed_model(wrap_with_ddp=True, pg_collection=groups)
            bridge.load_hf_weights(model)
            found[case] = by_task(bridge, model)
            bridge.save_hf_weights(model, f"{folder}/saved/{case}", distributed_save=True)
            if case == "TP2":
                found["log of probabilities"] = log_of_probabilities(model[0])
            if case == "TP2":
                other = ProcessGroupCollection()
                other.tp = groups.dp
                found["groups"] = refused(
                    lambda: provider.provide_distributed_model(pg_collection=other)  # noqa: B023
                )
            if case in ("TP2", "PP2"):
                found[f"{case}, critic"] = critic(bridge, provider)
            if case == "DP2":
                found["replicas"] = replicas(bridge, provider, model, f"{folder}/of replicas")
    torch.save(found, f"{folder}/found{rank}.pt")


@torch.no_grad()
def log_of_probabilities(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As clients compute them, of logits split over the vocabulary; and of all of them."""
    tokens = torch.arange(3, 16)[None]
    logits = model(input_ids=tokens, position_ids=None, attention_mask=None).float()
    first = dist.get_rank() * logits.shape[-1]
    here = (tokens >= first) & (tokens < first + logits.shape[-1])
    own = logits.gather(-1, (tokens - first).clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    chosen, total = own * here, logits.exp().sum(-1)
    dist.all_reduce(chosen)
    dist.all_reduce(total)
    whole = model(input_ids=tokens, runtime_gather_output=True).float().log_softmax(-1)
    return chosen - total.log(), whole.gather(-1, tokens[..., None])[..., 0]


def critic(bridge: Any, provider: Any) -> dict[str, Any]:
    """A value head on the last stage, which no file fills."""
    [model] = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=put_value_head)
    strict = refused(lambda: bridge.load_hf_weights([model]))
    bridge.load_hf_weights([model], allowed_mismatched_params=["output_layer.weight"])
    return {"strict": strict, "has head": model.language_model.post_process}


def replicas(bridge: Any, provider: Any, model: Any, target: str) -> dict[str, Any]:
    """Every replica exports all, the first one saves; values are those of the first on demand."""
    stored = bridge.hf_pretrained.state
    same = all(
        torch.equal(tensor, stored[name]) for name, tensor in bridge.export_hf_weights(model)
    )
    os.makedirs(target, exist_ok=True)  # noqa: PTH103 - as clients do, on every rank
    dist.barrier()
    bridge.save_hf_pretrained(model, target, distributed_save=True)
    again = refused(lambda: bridge.save_hf_pretrained(model, target))
    weights = []
    for asked in (False, True):
        torch.manual_seed(dist.get_rank())

        def draw(chunks: Any) -> None:
            for parameter in chunks[0].parameters():
                torch.nn.init.normal_(parameter)

        [chunk] = provider.provide_distributed_model(
            wrap_with_ddp=False, pre_wrap_hook=draw, data_parallel_random_init=asked
        )
        weights.append(chunk.language_model.output_layer.weight.detach().clone())
    return {"same": same, "again": again, "drawn": weights}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    make_models(folder)
    run_ranks(worker, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_tasks_are_those_of_the_whole_model(case: str, found: list[dict[str, Any]]) -> None:
    first, second = (one[case] for one in found)
    assert first["names"] == second["names"]
    assert first["owners"] == second["owners"]
    assert len(set(first["names"])) == len(first["names"])
    assert set(first["local"]) | set(second["local"]) == set(first["names"])
    assert first["wrong"] == second["wrong"] == []


def test_numbers_of_tasks(found: list[dict[str, Any]]) -> None:
    """Those of the whole model, and those that a rank knows."""
    first, second = (one["EP2"] for one in found)
    names = [one for one in first["names"] if ".layers.1.mlp.experts" in one and "fc1" in one]
    experts = len(names)
    assert experts % 2 == 0
    own = [[one for one in names if one in rank["local"]] for rank in (first, second)]
    assert own == [names[: experts // 2], names[experts // 2 :]]
    local = [second["local"][one] for one in own[1]]
    assert local == [first["local"][one] for one in own[0]]

    first, second = (one["PP2"] for one in found)
    layer = "language_model.decoder.layers.{}.mlp.router.weight"
    assert second["local"][layer.format(3)] == layer.format(0)
    assert layer.format(3) not in first["local"]
    owners = [dict(zip(one["names"], one["owners"], strict=True)) for one in (first, second)]
    assert owners[0] == owners[1]
    assert owners[0][layer.format(2)] == (0, 0)
    assert owners[0][layer.format(3)] == (1, 0)


def test_sizes_that_rows_tell(found: list[dict[str, Any]]) -> None:
    assert found[0]["TP2"]["sizes"] == {(False, 2, 1)}
    assert found[0]["TP2, experts"]["sizes"] == {(False, 2, 1), (True, 2, 1)}
    assert found[0]["EP2"]["sizes"] == {(False, 1, 2), (True, 1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved(case: str, folder: Path, found: list[dict[str, Any]]) -> None:
    assert_same_files(folder / "saved" / case, folder / CASES[case][0])


def assert_same_files(saved_to: Path, made_in: Path) -> None:
    from megatron.bridge.models.hf_pretrained.tensors import TensorIndex

    saved, stored = (TensorIndex.from_folder(one) for one in (saved_to, made_in))
    assert list(saved) == list(stored)
    assert all(torch.equal(saved.read(name), stored.read(name)) for name in stored)


def test_probabilities_of_tokens(found: list[dict[str, Any]]) -> None:
    for one in found:
        split, whole = one["log of probabilities"]
        assert (split - whole).abs().max() <= 1e-4


def test_refusals_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        assert one["groups"].startswith(f"pg_collection.tp has the ranks [{rank}]; expected [0, 1]")


def test_a_value_head(found: list[dict[str, Any]]) -> None:
    for case in ("TP2, critic", "PP2, critic"):
        for one in (rank[case] for rank in found):
            assert "output_layer.weight" in one["strict"]
    assert [one["PP2, critic"]["has head"] for one in found] == [False, True]


def test_replicas(found: list[dict[str, Any]], folder: Path) -> None:
    first, second = (one["replicas"] for one in found)
    assert first["same"]
    assert second["same"]
    assert_same_files(folder / "of replicas", folder / DENSE)
    for one in (first, second):
        assert "of replicas exists already" in one["again"]
    assert not torch.equal(first["drawn"][0], second["drawn"][0])
    assert torch.equal(first["drawn"][1], second["drawn"][1])
