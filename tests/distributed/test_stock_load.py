"""Two processes convert, and stock megatron-core loads the checkpoint in two processes at TP2."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
from forked import run_ranks
from megatron.bridge.cli import main
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.synthetic import make_model
from megatron.bridge.target.run import Run

WORLD = 2


def worker(rank: int, folder: str) -> None:
    """Loads twice, by stock load and straight from the Hugging Face files, and compares."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(f"{folder}/hf")
    states = []
    for load in ("stock", "hf"):
        provider = bridge.to_megatron_provider(load_weights=load == "hf")
        provider.tensor_model_parallel_size = WORLD
        [model] = provider.provide_distributed_model(wrap_with_ddp=False)
        if load == "stock":
            from megatron.core import dist_checkpointing

            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            folder_of_iteration = f"{folder}/megatron/iter_0000000"
            state = dist_checkpointing.load(model.sharded_state_dict(), folder_of_iteration)
            model.load_state_dict({k: state[k] for k in model.state_dict() if k in state})
        states.append({name: tensor.detach() for name, tensor in model.named_parameters()})
    torch.save(states, f"{folder}/states{rank}.pt")
    torch.save(mapped_one_by_one(bridge, model), f"{folder}/mapped{rank}.pt")


def mapped_one_by_one(bridge: Any, model: Any) -> dict[str, list[str]]:
    """Every row applied to its own module, both ways: what does not agree with files and model."""
    read = bridge.hf_pretrained.tensors.read
    wrong: dict[str, list[str]] = {"hf_to_megatron": [], "megatron_to_hf": [], "names": []}
    for task in bridge.get_conversion_tasks([model]):
        mapping, module, weight = task.mapping, task.megatron_module, task.param_weight.detach()
        whole = {role: read(name) for role, name in mapping.hf_params.items()}
        given = whole["hf"] if set(whole) == {"hf"} else whole
        if not torch.equal(mapping.hf_to_megatron(given, module), weight):
            wrong["hf_to_megatron"].append(task.global_param_name)
        for name, tensor in mapping.megatron_to_hf(weight, module).items():
            wrong["names"].append(name)
            if not torch.equal(tensor, read(name)):
                wrong["megatron_to_hf"].append(name)
    return wrong


def torchrun(*arguments: Path | str) -> None:
    """Run a command of the bridge in two processes."""
    done = forked.torchrun("-m", "megatron.bridge", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def command(rank: int, *arguments: Path | str) -> None:
    """One process of a command, with all of its imports behind it."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*map(str, arguments), "--json"]) == 0
    assert bool(printed.getvalue()) == (rank == 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tp2")
    settings = {"vision.num_heads": 4, "tie_word_embeddings": False, "text.attention_bias": True}
    settings |= {"num_shards": 3}
    make_model("qwen3-vl", folder / "hf", settings, seed=7)
    torchrun("import", folder / "hf", folder / "megatron", "--max-shard-size", "400kB")
    run_ranks(worker, str(folder), world=WORLD)
    return folder


def files_of(folder: Path) -> dict[Path, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_two_processes_write_what_one_does(folder: Path, tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    run = Run(max_shard_bytes=400_000)
    import_checkpoint(hf, tmp_path / "megatron", run=run)
    assert files_of(tmp_path / "megatron") == files_of(folder / "megatron")
    assert len([*(folder / "megatron").rglob("*.distcp")]) > 4
    export = ("export", folder / "megatron", tmp_path / "two", "--hf", folder / "hf", "--verify")
    run_ranks(command, *export, world=WORLD)
    export_checkpoint(folder / "megatron", tmp_path / "one", hf)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert files_of(tmp_path / "two").items() >= files_of(folder / "hf").items()


def test_every_shard_is_equal(folder: Path) -> None:
    for rank in range(WORLD):
        stock, from_hf = torch.load(folder / f"states{rank}.pt")
        assert stock.keys() == from_hf.keys()
        assert len(stock) > 100
        for name, tensor in stock.items():
            assert torch.equal(tensor, from_hf[name]), (rank, name)


def test_the_shards_are_those_of_the_files(folder: Path) -> None:
    """Both ranks' parts put together by hand, for a column-, a row- and a vocabulary-split."""
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    first, second = (torch.load(folder / f"states{rank}.pt")[0] for rank in range(WORLD))
    layer, hf_layer = "language_model.decoder.layers.1.", "model.language_model.layers.1."

    def parts(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return first[name], second[name]

    row = torch.cat(parts(f"{layer}mlp.linear_fc2.weight"), dim=1)
    assert torch.equal(row, hf.tensors.read(f"{hf_layer}mlp.down_proj.weight"))
    gates, ups = zip(
        *(part.chunk(2) for part in parts(f"{layer}mlp.linear_fc1.weight")), strict=True
    )
    assert torch.equal(torch.cat(gates), hf.tensors.read(f"{hf_layer}mlp.gate_proj.weight"))
    assert torch.equal(torch.cat(ups), hf.tensors.read(f"{hf_layer}mlp.up_proj.weight"))
    embedding = torch.cat(parts("language_model.embedding.word_embeddings.weight"))
    tokens = hf.tensors.read("model.language_model.embed_tokens.weight")
    assert torch.equal(embedding[: len(tokens)], tokens)
    assert len(embedding) % (2 * 128) == 0
    assert not embedding[len(tokens) :].any()


def test_every_row_maps_its_own_module(folder: Path) -> None:
    names = set(PreTrainedVLM.from_pretrained(folder / "hf").tensors)
    for rank in range(WORLD):
        mapped = torch.load(folder / f"mapped{rank}.pt")
        assert mapped["hf_to_megatron"] == []
        assert mapped["megatron_to_hf"] == []
        assert set(mapped["names"]) == names
