"""Pipelines of gloo processes, in megatron-core's own schedules, against one process.

Logits are transformers' and, bit for bit, those of our model in one process: a pipeline only moves
work. Gradients are bit for bit those of one process. Batches with pictures, with a video and
without either follow one another. The processes are started once and run every case; the tests
look at what they found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from forked import run_ranks
from oracle import text_models, tiny
from oracle.predictor import Predictor
from schedules import distributed_chunks, gradient_errors, logits_of, train_step, whole_gradients

EVEN_VISION_HEADS = {"vision_config": {"num_heads": 6}}
BALANCE = {"moe_aux_loss_coeff": 10.0}
PREDICTOR = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 40.0}
MTP_CONFIG = {"text_config": {"mtp_num_hidden_layers": 1}}
LENGTH = 112
TIED = {"tie_word_embeddings": True}
# model: (case of tiny.CASES or class of text_models, entries of its config, fields in every run)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vl": ("qwen3_vl", {}, {}),
    "vl_tied": ("qwen3_vl", TIED, {}),
    "vl_moe": ("qwen3_vl_moe", {}, BALANCE),
    "hybrid": ("qwen3_5-3x_value_heads-one_kv_head", {}, {}),
    "hybrid_mtp": ("qwen3_5-3x_value_heads-one_kv_head", MTP_CONFIG, PREDICTOR),
    "hybrid_mtp_tied": ("qwen3_5-3x_value_heads-one_kv_head", MTP_CONFIG | TIED, PREDICTOR),
    "hybrid_moe_mtp": ("qwen3_5_moe-2x_value_heads", MTP_CONFIG, BALANCE | PREDICTOR),
    "text": ("Qwen3ForCausalLM", {}, {}),
}


def pipeline(layout: str = "", stages: int = 2, **fields: Any) -> dict[str, Any]:
    """Fields of a pipeline; what chunks of two stages send must overlap."""
    fields |= {"pipeline_model_parallel_size": stages}
    fields |= {"pipeline_model_parallel_layout": layout or None}
    if layout.count("|") < stages:
        return fields
    return fields | {"overlap_p2p_comm": True, "batch_p2p_comm": False}


# case: (model, fields of the provider)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepstack_on_stage_two": ("vl", pipeline("Et|ttttL")),
    "no_layer_on_stage_one": ("vl_moe", pipeline("E|tttttL")),
    "deepstack_on_chunks": ("vl", pipeline("Et|t|tt|tL")),
    "uneven_tied": (
        "vl_tied",
        pipeline(num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=2),
    ),
    "interleaved_tied": ("vl_tied", pipeline("Et|t|tt|tL")),
    "embedding_is_a_layer": ("vl", pipeline(account_for_embedding_in_pipeline_split=True)),
    "even": ("hybrid", pipeline()),
    "predictors": ("hybrid_mtp", pipeline("Etttt|ttmL")),
    "predictors_tied": ("hybrid_mtp_tied", pipeline()),
    "predictors_on_a_chunk": ("hybrid_moe_mtp", pipeline("Et|t|tt|tmL")),
    "predictors_before_the_last": ("hybrid_mtp", pipeline("Ettttttm|L")),
    "predictors_before_the_last_tied": ("hybrid_mtp_tied", pipeline("Ettttttm|L")),
    "text": ("text", pipeline("Etttt|tL")),
}


def batches_of(model: str) -> list[dict[str, Any]]:
    """Four microbatches of two rows of one length: pictures, none, a video, none."""
    if MODELS[model][0] in text_models.MODELS:
        draw = torch.Generator().manual_seed(3)
        found = [{"input_ids": torch.randint(6, 300, (2, 12), generator=draw)} for _ in range(4)]
        return [one | {"labels": one["input_ids"].roll(-1, 1)} for one in found]
    processor = tiny.build_processor()
    [china, _] = tiny.photographs()
    prompts: list[tuple[list[str], dict[str, Any]]] = [
        ([f"See {tiny.IMAGE} now", "Only words."], {"images": [china.resize((160, 128))]}),
        (["No picture at all", "here."], {}),
        (["Short.", f"A film {tiny.VIDEO}"], {"videos": [tiny.video()]}),
        (["Words", "and words."], {}),
    ]
    found = [
        tiny.prompt(
            processor,
            text,
            **media,
            padding="max_length",
            max_length=LENGTH,
            padding_side="right",
        )
        for text, media in prompts
    ]
    for one in found:
        labels = one["input_ids"].roll(-1, dims=1)
        labels[(one["mm_token_type_ids"] != 0) | (one["attention_mask"] == 0)] = -100
        one["labels"] = labels
    return found


def without_labels(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: one[key] for key in one if key != "labels"} for one in batches]


def save_reference(folder: Path, model: str) -> None:
    """The files, and the logits and gradients of one process."""
    name, entries, fields = MODELS[model]
    if name in text_models.MODELS:
        hf = text_models.build(name, **entries)
        text_models.save(hf, folder / model)
    else:
        processor = tiny.build_processor()
        hf = tiny.build_hf_model(tiny.build_case(processor, name, **EVEN_VISION_HEADS, **entries))
        hf.save_pretrained(folder / model)
        processor.save_pretrained(folder / model)
        if "mtp_num_layers" in fields:
            Predictor(hf).add_to(folder / model)
    batches = batches_of(model)
    with torch.no_grad():
        theirs = [hf(**one, use_cache=False).logits for one in without_labels(batches)]
    with distributed_chunks(folder / model, fields) as chunks:
        logits = logits_of(chunks, without_labels(batches))
        loss = train_step(chunks, batches)
        gradients = whole_gradients(chunks)
    reference = {"hf": theirs, "logits": logits, "loss": loss, "gradients": gradients}
    torch.save(reference | {"batches": batches}, folder / f"{model}.pt")


def run_case(folder: Path, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    reference = torch.load(folder / f"{model}.pt")
    batches, found = reference["batches"], {}
    with distributed_chunks(folder / model, MODELS[model][2] | fields) as chunks:
        logits = logits_of(chunks, without_labels(batches))
        loss = train_step(chunks, batches)
        found["gradients"] = gradient_errors(chunks, reference["gradients"])
    if logits:
        size = reference["hf"][0].shape[-1]
        found["logits"] = max(
            float(
                (mine[..., :size] - theirs)[
                    one.get("attention_mask", mine[..., 0] == mine[..., 0]).bool()
                ]
                .abs()
                .max()
                / theirs.abs().max()
            )
            for mine, theirs, one in zip(logits, reference["hf"], batches, strict=True)
        )
        found["same logits"] = all(map(torch.equal, logits, reference["logits"]))
        found["same loss"] = all(map(torch.equal, loss, reference["loss"]))
    return found


def worker(rank: int, folder: str, cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    results = {case: run_case(Path(folder), *cases[case]) for case in cases}
    torch.save(results, f"{folder}/results{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, case by case."""
    from megatron.bridge.runtime.parallel import destroy_process_groups

    folder = tmp_path_factory.mktemp("pipelines")
    for model in {model for model, _ in CASES.values()}:
        save_reference(folder, model)
    destroy_process_groups()
    run_ranks(worker, str(folder), CASES)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_logits(results: list[dict[str, Any]], case: str) -> None:
    [found] = [ranks[case] for ranks in results if "logits" in ranks[case]]
    assert found["logits"] <= 1e-4
    assert found["same logits"]
    assert found["same loss"]


@pytest.mark.parametrize("case", CASES)
def test_every_gradient(results: list[dict[str, Any]], case: str) -> None:
    errors = [ranks[case]["gradients"] for ranks in results]
    print(case, sorted(((e, k) for x in errors for k, e in x.items()))[-3:])
    for one in errors:
        worst = {key: error for key, error in one.items() if error > 0}
        assert not worst, worst
