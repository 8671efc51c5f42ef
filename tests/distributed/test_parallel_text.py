"""Models of text alone on two ranks: logits and scores are transformers', and so are gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from forked import run_ranks
from oracle import text_models

SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {
    "pipeline_model_parallel_size": 2,
    "num_layers_in_first_pipeline_stage": 3,
    "num_layers_in_last_pipeline_stage": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": ("Qwen3_5ForCausalLM", SEQUENCE),
    "tokens": ("Qwen3ForTokenClassification", SEQUENCE),
    "sequences": ("Qwen3_5TextForSequenceClassification", SEQUENCE),
    "pipeline_of_sequences": ("Qwen3ForSequenceClassification", PIPELINE),
}
# Megatron's name: transformers', of parameters that every rank of a last stage holds whole.
WHOLE = {
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "score.weight",
    "output_layer.bias": "score.bias",
}


def inputs_of(name: str) -> dict[str, Tensor]:
    """12 tokens, so that each of two ranks has 6; the second sequence ends early."""
    ids = torch.randint(6, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, -4:], ids[1, -4:] = 0, 5
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    if output.ndim == 3:
        output = output[inputs["attention_mask"].bool()]
    return output.square().sum()


def run_case(name: str, fields: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    for key, value in fields.items():
        setattr(provider, key, value)
    if provider.num_moe_experts:
        provider.moe_aux_loss_coeff = 0.0
    [model] = provider.provide_distributed_model(wrap_with_ddp=True)
    model.eval()
    model.zero_grad_buffer()
    inputs = inputs_of(name)
    last = "pipeline_model_parallel_size" not in fields or rank == 1
    if last and "pipeline_model_parallel_size" in fields:
        hidden_states = torch.empty(12, 2, 80)
        dist.recv(hidden_states, src=0)
        model.module.set_input_tensor(hidden_states.requires_grad_())
    output = model(**inputs, **({"trim_vocab_padding": True} if last else {}))
    found: dict[str, Any] = {}
    if last:
        loss_of(output, inputs).backward()
        found["output"] = output.detach()
    else:
        dist.send(output.detach(), dst=1)
        output.sum().backward()
    finalize_model_grads([model])
    found["gradients"] = {
        key: parameter.main_grad.clone()
        for key, parameter in model.module.named_parameters()
        if key in WHOLE and (key != "output_layer.weight" or "Classification" in name)
    }
    parallel_state.destroy_model_parallel()
    return found


def worker(rank: int, folder: str) -> None:
    results = {
        case: run_case(name, fields, Path(folder, case), rank)
        for case, (name, fields) in CASES.items()
    }
    torch.save(results, f"{folder}/results{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parallel")
    for case, (name, _) in CASES.items():
        text_models.save(text_models.build(name), folder / case)
    run_ranks(worker, str(folder))
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(results: list[dict[str, Any]], case: str) -> None:
    name, fields = CASES[case]
    hf, inputs = text_models.build(name), inputs_of(name)
    expected = hf(**inputs, use_cache=False).logits
    loss_of(expected, inputs).backward()
    gradients = {key: one.grad for key, one in hf.named_parameters()}
    real = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
    ranks = results[1:] if fields is PIPELINE else results
    for found in (rank[case] for rank in ranks):
        assert (found["output"][real] - expected[real]).abs().max() <= 1e-4
        assert ("output_layer.weight" in found["gradients"]) == ("Classification" in name)
        for key, gradient in found["gradients"].items():
            theirs = gradients[WHOLE[key]]
            assert (gradient - theirs).norm() <= 1e-3 * theirs.norm(), key
