"""Ranks that hold a model together: what is proven of it, what each reads, how it is saved.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.errors import CheckpointError
from megatron.bridge.exchange.roster import Roster, Shard
from megatron.bridge.live.local_tensors import local_tensors
from megatron.bridge.live.weights import load_weights, plan_of_model
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.synthetic import make_model
from model_folders import read_tensors, same_tensors

WORLD = 2
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def halves(layers: int) -> dict[str, int]:
    """Two stages of which the first has one layer more than the other."""
    stages = layers - layers // 2, layers // 2
    names = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
    return PP2 | dict(zip(names, stages, strict=True))


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3-vl", {"tie_word_embeddings": True}),
    "experts": ("qwen3-vl-moe", {}),
    "hybrid": ("qwen3.5-moe", {}),
}
# Case: the model, fields of the provider, and those of another one that loads what this one saves.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied-pp2": ("tied", halves(5), TP2),
    "experts-ep2": ("experts", EP2, halves(7)),
    "experts-pp2": ("experts", halves(7), EP2),
    "hybrid-tp2": ("hybrid", TP2, {}),
    "hybrid-dp2": ("hybrid", {}, EP2),
}


def built(bridge: AutoBridge, fields: dict[str, Any]) -> list[Any]:
    """This rank's part of a model, in process groups of its own."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.set_fields(fields)
    return list(provider.provide_distributed_model(wrap_with_ddp=False))


class Counted:
    """A source that counts the bytes that are asked of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.nbytes = source, 0

    def dtype_of(self, name: str) -> str:
        found: str = self.source.dtype_of(name)
        return found

    def read_into(self, name: str, box: Any, out: Any) -> None:
        self.nbytes += out.nbytes
        self.source.read_into(name, box, out)


def said(action: Callable[[], Any]) -> str:
    """How a call ends on this rank."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - it is looked at
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def run_case(folder: Path, name: str) -> dict[str, Any]:
    from megatron.core import parallel_state

    model_name, fields, others = CASES[name]
    bridge = AutoBridge.from_hf_pretrained(folder / model_name)
    model = built(bridge, fields)
    plan = plan_of_model(bridge.hf_pretrained, model)
    counted = Counted(bridge.hf_pretrained.weights)
    load_weights(model, plan, counted)
    padding = sum(
        2 * torch.Size(stop - start for start, stop in box).numel()
        for one in local_tensors(model)
        for box in plan.padding_in(one.key, one.box)
    )
    roster = Roster.of(Ranks(), local_tensors(model))
    saved = folder / "saved" / name
    bridge.save_megatron_model(model, saved)
    bridge.save_hf_pretrained(model, folder / "hf" / name)

    parallel_state.destroy_model_parallel()
    [loaded] = bridge.load_megatron_model(saved, mp_overrides=others)
    [expected] = built(bridge, others)
    bridge.load_hf_weights([expected])
    expected_values = values(expected)
    return {
        "read": counted.nbytes,
        "held": sum(one.data.nbytes for one in local_tensors(model)) - padding,
        "roster": roster.by_rank,
        "main": [list(roster.main_of(rank)) for rank in range(WORLD)],
        "plan": {key: spec.nbytes for key, spec in plan.megatron.items()},
        "differ": [
            key for key, value in values(loaded).items() if not same(value, expected_values[key])
        ],
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def refusals(folder: Path, rank: int) -> dict[str, str]:
    """Where one rank cannot go on: what is said on this one."""
    bridge = AutoBridge.from_hf_pretrained(folder / "experts")
    [model] = built(bridge, halves(7))
    before = values(model)
    found = {}
    if rank == 1:
        last = model.language_model.decoder.layers
        kept, last._modules = last._modules, dict(list(last._modules.items())[:-1])
    found["a layer less"] = said(lambda: bridge.load_hf_weights([model]))
    if rank == 1:
        last._modules = kept
    found["no chunk"] = said(lambda: bridge.load_hf_weights([model] if rank else []))
    found["untouched"] = str(
        all(same(before[name], value) for name, value in values(model).items())
    )

    class Broken(Counted):
        def read_into(self, name: str, box: Any, out: Any) -> None:
            if rank == 1:
                raise CheckpointError(f"{name}: cannot be read")
            super().read_into(name, box, out)

    plan = plan_of_model(bridge.hf_pretrained, [model])
    broken = Broken(bridge.hf_pretrained.weights)
    found["not readable"] = said(lambda: load_weights([model], plan, broken))
    bridge.load_hf_weights([model])

    target = folder / "refused"
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("megatron.bridge.live.megatron_checkpoint.write_files", full_disk)
        found["not writable"] = said(lambda: bridge.save_megatron_model([model], target))
    is_dir = Path.is_dir
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(
                Path, "is_dir", lambda path: ".partial-" not in path.name and is_dir(path)
            )
        found["not shared"] = said(lambda: bridge.save_megatron_model([model], target))
        found["weights not shared"] = said(lambda: bridge.save_hf_weights([model], target))
    own = folder / f"refused-{rank}"
    found["not the same"] = said(lambda: bridge.save_hf_pretrained([model], own))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("megatron.bridge.live.shared_files.write_all", full_disk)
        found["weights not writable"] = said(lambda: bridge.save_hf_pretrained([model], target))
    dist.barrier()
    found["left"] = str(sorted(path.name for path in folder.glob("*refused*")))
    found["saved"] = said(lambda: bridge.save_megatron_model([model], target))
    found["again"] = said(lambda: bridge.save_megatron_model([model], target))
    found["forced"] = said(lambda: bridge.save_megatron_model([model], target, force=True))
    return found


def full_disk(*_: object) -> None:
    raise CheckpointError("no space left on device")


def worker(rank: int, folder: str) -> None:
    found = {name: run_case(Path(folder), name) for name in CASES}
    found["refusals"] = refusals(Path(folder), rank)
    torch.save(found, f"{folder}/found{rank}.pt")
    destroy_process_groups()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("over-ranks")
    for name, (family, settings) in MODELS.items():
        make_model(family, folder / name, settings)
    run_ranks(worker, str(folder), world=WORLD)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_each_rank_reads_what_it_holds_and_the_sum_is_the_model_once(
    case: str, found: list[dict[str, Any]]
) -> None:
    ranks = [one[case] for one in found]
    for rank in ranks:
        assert rank["read"] == rank["held"]
        assert rank["roster"] == ranks[0]["roster"]
        assert rank["main"] == ranks[0]["main"]
    main = [shard for own in ranks[0]["main"] for shard in own]
    assert sum(map(nbytes, main)) == sum(ranks[0]["plan"].values())
    if CASES[case][1]:
        assert ranks[0]["read"] < sum(ranks[0]["plan"].values())


def nbytes(shard: Shard) -> int:
    size = torch.Size(stop - start for start, stop in shard.box).numel()
    return size * {"BF16": 2, "F32": 4}[shard.dtype]


@pytest.mark.parametrize("case", CASES)
def test_another_layout_loads_what_is_saved(case: str, found: list[dict[str, Any]]) -> None:
    assert [rank[case]["differ"] for rank in found] == [[], []]


@pytest.mark.parametrize("case", CASES)
def test_a_split_model_is_saved_byte_for_byte_as_its_files(
    case: str, folder: Path, found: list[dict[str, Any]]
) -> None:
    model, saved = folder / CASES[case][0], folder / "hf" / case
    names = sorted(path.name for path in model.iterdir())
    assert names == sorted(path.name for path in saved.iterdir())
    for name in names:
        assert (saved / name).read_bytes() == (model / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_exports_to_the_files_of_the_model(
    case: str, folder: Path, tmp_path: Path, found: list[dict[str, Any]]
) -> None:
    model = folder / CASES[case][0]
    export_checkpoint(
        folder / "saved" / case, tmp_path / "hf", PreTrainedVLM.from_pretrained(model)
    )
    assert same_tensors(model, tmp_path / "hf")
    assert read_tensors(model).keys() == read_tensors(tmp_path / "hf").keys()
    writers = {path.name.split("_")[2] for path in (folder / "saved" / case).rglob("__*.distcp")}
    assert writers == ({"0"} if not CASES[case][1] else {"0", "1"})


REFUSALS = {
    "a layer less": "the ranks do not hold the model once: ",
    "no chunk": "model is an empty list; give the chunks",
    "not readable": "cannot be read",
    "not writable": "no space left on device",
    "not shared": "refused: not every rank sees it; choose a shared folder",
    "weights not shared": "refused: not every rank sees it; choose a shared folder",
    "weights not writable": "no space left on device",
    "not the same": "refused-1 on rank 1; give the same one on every rank",
    "again": "refused exists already; choose another name",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_one_rank_refuses_all_refuse(what: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert REFUSALS[what] in rank["refusals"][what]


def test_nothing_is_left_of_what_was_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["refusals"]["untouched"] == "True"
        assert rank["refusals"]["left"] == "[]"
        assert rank["refusals"]["saved"] == rank["refusals"]["forced"] == "nothing was refused"
