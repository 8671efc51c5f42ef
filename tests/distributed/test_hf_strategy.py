"""Two ranks load Hugging Face folders by stock `dist_checkpointing.load`, and save them again.

What is loaded is what stock `load` reads of the same model as `import` writes it. The processes
are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from forked import run_ranks
from megatron.bridge.errors import TargetExists
from megatron.bridge.live.shared_staging import filled_by_ranks
from megatron.bridge.models.conversion.layer_keys import SPARSE_NORM, SPARSE_NORM_AS_FUSED
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import import_checkpoint
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.synthetic import make_model
from model_folders import read_tensors, same_tensors
from oracle.gpt_models import stock_gpt_model

FAMILIES = {
    "qwen3-vl": 5,
    "qwen3-vl-moe": 7,
    "qwen3.5": 6,
    "qwen3.5-moe": 7,
    "qwen3": 5,
    "qwen3-moe": 7,
    "qwen3.5-text": 6,
    "qwen3.5-moe-text": 7,
}
"""Layers by the name of the small model."""

QUICK = ("qwen3-vl-moe", "qwen3.5-moe", "qwen3", "qwen3-moe")
"""What is asked of every change; the others have no layer of a kind that these have not."""

COPIED = "copied"
"""A model with a tied embedding, and a copy of it in the files all the same."""

VOCABULARY = 307
PER_LAYER = {"non_homogeneous_layers": True}


def layouts(family: str) -> dict[str, dict[str, Any]]:
    """Fields of the provider, by the name of the layout."""
    layers = FAMILIES[family]
    found: dict[str, dict[str, Any]] = {
        "tp2": {"tensor_model_parallel_size": 2},
        "pp2": {
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": layers - layers // 2,
            "num_layers_in_last_pipeline_stage": layers // 2,
        },
    }
    if "moe" in family:
        found["ep2"] = {"expert_model_parallel_size": 2}
    return found


CASES = [(family, layout) for family in FAMILIES for layout in layouts(family)]
STOCK = [(family, layout) for family in ("qwen3", "qwen3-moe") for layout in layouts(family)]


def built(folder: Path, family: str, layout: str) -> Any:
    """This rank's part of the model, by its provider."""
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(folder / "hf").to_megatron_provider(load_weights=False)
    provider.set_fields(layouts(family)[layout])
    if "3.5" in family and layout != "pp2":
        provider.mtp_num_layers = 1
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    return model


class Asked:
    """Counts the bytes of boxes that are read from safetensors files."""

    def __init__(self) -> None:
        self.bytes = 0
        self._read_into = TensorIndex.read_into

    def __enter__(self) -> Asked:
        def read_into(index: TensorIndex, name: str, box: Any, out: Any) -> None:
            self.bytes += out.nbytes
            self._read_into(index, name, box, out)

        TensorIndex.read_into = read_into
        return self

    def __exit__(self, *_: object) -> None:
        TensorIndex.read_into = self._read_into


def held_bytes(state: Any) -> int:
    """What a rank holds, rows behind the vocabulary aside."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    total = 0
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            rows = entry.data.shape[0] if entry.data.ndim else 1
            nbytes = entry.data.nbytes
            if entry.allow_shape_mismatch:
                first = entry.global_offset[0]
                kept = max(0, min(first + rows, VOCABULARY) - first)
                nbytes = nbytes // rows * kept
            total += nbytes
    return total


def forget(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def compared(
    folder: Path, model: Any, metadata: Any = None, shared_out: bool = False
) -> dict[str, Any]:
    """The model filled both ways, and what is different."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )

    from megatron.bridge import HuggingFaceStrategy

    forget(model)
    loaded = dist_checkpointing.load(
        as_imported(model.sharded_state_dict()), str(folder / "megatron" / "iter_0000000")
    )
    expected = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in loaded.items()
    }
    forget(model)
    strategy = HuggingFaceStrategy(folder / "hf")
    state = model.sharded_state_dict(metadata=metadata and dict(metadata))
    used = (
        FullyParallelLoadStrategyWrapper(strategy, exchange_algo="gather_object")
        if shared_out
        else strategy
    )
    with Asked() as asked:
        found = dist_checkpointing.load(state, strategy.checkpoint_dir, sharded_strategy=used)
    return {
        "tensors": sum(isinstance(value, torch.Tensor) for value in found.values()),
        "wrong": [
            name
            for name in expected.keys() | found.keys()
            if not same(expected.get(name, ...), found.get(name, ...))
        ],
        "asked": asked.bytes,
        "held": held_bytes(state),
    }


def as_imported(state: Any) -> Any:
    """The norm before experts has another key by megatron-core's local layer spec."""
    keys = {entry.key for entry in state.values()}
    for entry in state.values():
        layer, norm, rest = entry.key.partition(SPARSE_NORM_AS_FUSED)
        if norm and f"{layer}.mlp.router.weight" in keys:
            entry.key = f"{layer}{SPARSE_NORM}{rest}"
    return state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def saved(
    folder: Path, model: Any, target: Path, metadata: Any = None, shared_out: bool = False
) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    from megatron.bridge import HuggingFaceStrategy

    if torch.distributed.get_rank() == 0:
        target.mkdir()
    torch.distributed.barrier()
    strategy = HuggingFaceStrategy(folder / "hf")
    state = model.sharded_state_dict(metadata=metadata and dict(metadata))
    used = FullyParallelSaveStrategyWrapper(strategy) if shared_out else strategy
    dist_checkpointing.save(state, str(target), sharded_strategy=used)


def worker(rank: int, root: str, families: Sequence[str]) -> None:
    from megatron.core import parallel_state

    from megatron.bridge.runtime.cpu import activate_megatron_on_cpu

    activate_megatron_on_cpu()
    found: dict[Any, Any] = {}
    for name in ("tp2", "pp2", "ep2"):  # making process groups takes longer than anything else
        for family in [one for one in families if name in layouts(one)]:
            folder = Path(root, family)
            model = built(folder, family, name)
            found[family, name] = compared(folder, model)
            saved(folder, model, folder / f"saved-{name}")
            if (family, name) == ("qwen3-vl-moe", "pp2"):
                found["per layer"] = compared(folder, model, PER_LAYER)
                saved(folder, model, folder / "saved-per-layer", PER_LAYER)
            if (family, name) == ("qwen3-vl-moe", "ep2"):
                found["shared out"] = compared(folder, model, shared_out=True)
                saved(folder, model, folder / "saved-shared-out", shared_out=True)
            if (family, name) == ("qwen3-moe", "ep2"):
                found["refusals"] = refusals(folder, model, rank)
        if name == "tp2" and families == QUICK:
            folder = Path(root, COPIED)
            found[COPIED] = compared(folder, built(folder, "qwen3", name))
        for family in [one for one, layout in STOCK if one in families and layout == name]:
            folder = Path(root, family)
            model = stock_gpt_model(folder / "hf", **layouts(family)[name])
            found["stock", family, name] = compared(folder, model)
            saved(folder, model, folder / f"stock-saved-{name}")
        parallel_state.destroy_model_parallel()
    torch.save(found, f"{root}/found{rank}.pt")


def refusals(folder: Path, model: Any, rank: int) -> dict[str, str]:
    """What is raised here where something is wrong on the second rank alone."""
    from megatron.core import dist_checkpointing

    from megatron.bridge import HuggingFaceStrategy
    from megatron.bridge.errors import BridgeError, InputError
    from megatron.bridge.live import shard_transfer

    found: dict[str, str] = {}

    def attempt(name: str, act: Callable[[Any], None], save: bool, **options: Any) -> None:
        strategy = HuggingFaceStrategy(folder / "hf", **options)
        state, target = model.sharded_state_dict(), folder / f"refused-{name.replace(' ', '-')}"
        if rank == 1:
            act(state)
        else:
            target.mkdir()
        torch.distributed.barrier()
        if rank == 1 and act is elsewhere:
            target = target.with_name("elsewhere")
        try:
            if save:
                dist_checkpointing.save(
                    state, str(target), sharded_strategy=strategy, validate_access_integrity=False
                )
            else:
                dist_checkpointing.load(
                    state,
                    strategy.checkpoint_dir,
                    sharded_strategy=strategy,
                    validate_access_integrity=False,
                )
        except BridgeError as error:
            found[name] = str(error)
        else:
            found[name] = "nothing was refused"
        torch.distributed.barrier()

    def router(state: Any) -> Any:
        return next(entry for name, entry in state.items() if name.endswith("router.weight"))

    def unknown(state: Any) -> None:
        router(state).key += "_of_another"

    def optimizer(state: Any) -> None:
        router(state).key = "optimizer.state.exp_avg." + router(state).key

    def lost(state: Any) -> None:
        experts = [name for name in state if ".local_experts.1.linear_fc2.weight" in name]
        del state[experts[0]]

    def fine(state: Any) -> None:
        with torch.no_grad():
            expert = next(e for n, e in state.items() if ".local_experts.1.linear_fc2.weight" in n)
            expert.data = expert.data.float() + 1e-6
            expert.dtype = torch.float32

    def elsewhere(state: Any) -> None:
        """Saves it to a folder that the other rank does not see."""

    def out_of_memory(_state: Any) -> None:
        """Lacks the memory for what only this rank writes, when there are files."""

        def own_boxes(*_: Any) -> Any:
            raise InputError("not enough memory")

        patch.setattr(shard_transfer, "own_boxes", own_boxes)

    with pytest.MonkeyPatch.context() as patch:
        attempt("save late", out_of_memory, save=True)
    attempt("load unknown", unknown, save=False)
    attempt("load optimizer", optimizer, save=False)
    attempt("save lost", lost, save=True)
    attempt("save fine", fine, save=True)
    attempt("save elsewhere", elsewhere, save=True)
    attempt("save rounded", fine, save=True, round=True)
    return found


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """Of some families, what two ranks left; they are started when somebody asks."""
    return cache(lambda families: made(tmp_path_factory.mktemp("strategy"), families))


def made(root: Path, families: tuple[str, ...]) -> Path:
    for seed, family in enumerate(families):
        make_model(family, root / family / "hf", {"num_shards": 3}, seed=seed)
        import_checkpoint(
            PreTrainedVLM.from_pretrained(root / family / "hf"), root / family / "megatron"
        )
    if families != QUICK:
        run_ranks(worker, str(root), families)
        return root
    hf = make_model("qwen3", root / COPIED / "hf", {"tie_word_embeddings": True}, seed=9)
    tensors = read_tensors(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(PreTrainedVLM.from_pretrained(hf), root / COPIED / "megatron")
    run_ranks(worker, str(root), families)
    return root


@pytest.fixture
def root(request: pytest.FixtureRequest, roots: Callable[[tuple[str, ...]], Path]) -> Path:
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    others = tuple(one for one in FAMILIES if one not in QUICK)
    return roots(others if isinstance(case, tuple) and case[-2] in others else QUICK)


@pytest.fixture
def found(root: Path) -> list[dict[Any, Any]]:
    return [torch.load(root / f"found{rank}.pt") for rank in range(2)]


OTHERS = {"per layer": "qwen3-vl-moe", "shared out": "qwen3-vl-moe"}
OF_STOCK = [("stock", *case) for case in STOCK]


MARKED = [
    case if case[0] in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES
]


@pytest.mark.parametrize("case", [*MARKED, *OF_STOCK, *OTHERS])
def test_what_is_loaded_is_what_import_writes(found: list[dict[Any, Any]], case: Any) -> None:
    for rank in found:
        assert rank[case]["wrong"] == []
        assert rank[case]["tensors"] > 15


@pytest.mark.parametrize("case", [*MARKED, *OF_STOCK])
def test_each_rank_reads_its_own_boxes_alone(
    root: Path, found: list[dict[Any, Any]], case: Any
) -> None:
    family = case[-2]
    files = TensorIndex.from_folder(root / family / "hf")
    whole = sum(spec.nbytes for spec in files.values())
    for rank in found:
        assert 0 < rank[case]["asked"] == rank[case]["held"] < whole


def test_copies_are_compared_once(found: list[dict[Any, Any]]) -> None:
    first, second = (rank[COPIED] for rank in found)
    assert first["wrong"] == second["wrong"] == []
    assert second["asked"] == second["held"]
    copies = 2 * VOCABULARY * 160 * 2
    assert first["asked"] == first["held"] + copies


def test_replicas_are_read_once_where_ranks_share_them(found: list[dict[Any, Any]]) -> None:
    """By megatron-core's own wrapper of strategies."""
    once, each = (
        sum(rank[case]["asked"] for rank in found)
        for case in ("shared out", ("qwen3-vl-moe", "ep2"))
    )
    assert once < 0.7 * each


@pytest.mark.parametrize("case", [*MARKED, *OF_STOCK, *OTHERS])
def test_what_is_saved_is_what_was_loaded(root: Path, case: Any) -> None:
    if case in OTHERS:
        family, name = OTHERS[case], f"saved-{case.replace(' ', '-')}"
    else:
        *of_stock, family, layout = case
        name = f"{'stock-' if of_stock else ''}saved-{layout}"
    hf, saved = root / family / "hf", root / family / name
    names = {path.name for path in hf.iterdir()}
    assert {path.name for path in saved.iterdir()} == names | {"metadata.json"}
    for path in hf.iterdir():
        assert (saved / path.name).read_bytes() == path.read_bytes(), path.name


REFUSALS = {
    "load unknown": "router.weight_of_another: no Hugging Face tensor fills it",
    "load optimizer": "optimizer.state.exp_avg.decoder.layers",
    "save lost": "mlp.experts.experts.linear_fc2.weight: [0:1, 4:5, 0:160,",
    "save fine": "do not fit",
    "save elsewhere": "elsewhere on rank 1; give the same one on every rank",
    "save late": "not enough memory",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_refuses_or_none(root: Path, found: list[dict[Any, Any]], name: str) -> None:
    first, second = (rank["refusals"][name] for rank in found)
    assert REFUSALS[name] in second
    assert first == second or first == f"rank 1 cannot go on: {second}"
    assert len(first.splitlines()) <= 6
    if name.startswith("save"):
        assert [*(root / "qwen3-moe" / f"refused-{name.replace(' ', '-')}").iterdir()] == []


def test_values_are_rounded_where_that_is_asked_for(
    root: Path, found: list[dict[Any, Any]]
) -> None:
    assert {rank["refusals"]["save rounded"] for rank in found} == {"nothing was refused"}
    assert not same_tensors(root / "qwen3-moe" / "hf", root / "qwen3-moe" / "refused-save-rounded")


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_what_is_no_unfinished_folder_is_left_alone(kind: str, tmp_path: Path) -> None:
    (target := tmp_path / "out").mkdir()
    (other := tmp_path / "other").mkdir()
    (other / "kept").touch()
    left = target / ".hugging-face.partial-0011aabb"
    left.touch() if kind == "a file" else left.symlink_to(other)
    with pytest.raises(TargetExists, match=r"it holds \.hugging-face\.partial-0011aabb; give an"):
        filled_by_ranks(target, Ranks()).__enter__()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other", left.name, "kept"]
