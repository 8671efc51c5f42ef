"""Stock megatron-core loads data that lie as in the files, experts transposed, in two processes."""

from pathlib import Path

import pytest
import torch

from forked import run_ranks
from megatron.bridge.formats.file_plans import plan_of
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.unchanged import chunks_of
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import import_checkpoint
from megatron.bridge.synthetic import make_model

WORLD = 2
SETTINGS = {
    "text.hidden_size": 256,
    "text.num_attention_heads": 4,
    "text.num_key_value_heads": 2,
    "text.head_dim": 128,
    "text.vocab_size": 1003,
    "text.num_hidden_layers": 2,
    "text.moe_intermediate_size": 144,
    "text.num_experts": 4,
    "vision.num_heads": 4,
}


def worker(rank: int, folder: str, experts: int) -> None:
    """Loads by stock load and straight from the Hugging Face files."""
    from megatron.core import dist_checkpointing

    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(f"{folder}/hf")
    states = []
    for load in ("stock", "hf"):
        provider = bridge.to_megatron_provider(load_weights=load == "hf")
        provider.tensor_model_parallel_size = WORLD // experts
        provider.expert_model_parallel_size = experts
        provider.expert_tensor_parallel_size = WORLD // experts
        [model] = provider.provide_distributed_model(wrap_with_ddp=False)
        if load == "stock":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            state = dist_checkpointing.load(
                model.sharded_state_dict(), f"{folder}/megatron/iter_0000000"
            )
            model.load_state_dict({k: state[k] for k in model.state_dict() if k in state})
        states.append({name: tensor.detach() for name, tensor in model.named_parameters()})
    torch.save(states, f"{folder}/states{rank}-{experts}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranges")
    hf = PreTrainedVLM.from_pretrained(make_model("qwen3-vl-moe", folder / "hf", SETTINGS, seed=7))
    import_checkpoint(hf, folder / "megatron")
    return folder


def test_there_are_such_data(folder: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    chunks = list(chunks_of(plan_of(hf, PlanOptions()), hf.weights.place))
    for kind in ("self_attention.linear_qkv.weight", "mlp.experts.experts.linear_fc1.weight"):
        key = f"language_model.decoder.layers.{kind}"
        found = [chunk.data for chunk in chunks if chunk.key == key]
        assert found
        assert all(found)
        assert all(data and data.transposed == ("fc1" in kind) for data in found)


@pytest.mark.parametrize("experts", [1, WORLD])
def test_every_shard_is_equal(folder: Path, experts: int) -> None:
    run_ranks(worker, str(folder), experts, world=WORLD)
    for rank in range(WORLD):
        stock, from_hf = torch.load(folder / f"states{rank}-{experts}.pt")
        assert stock.keys() == from_hf.keys()
        assert len(stock) > 50
        for name, tensor in stock.items():
            assert torch.equal(tensor, from_hf[name]), (rank, name)
