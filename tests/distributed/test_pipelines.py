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
from torch import Tensor

from forked import run_ranks
from oracle import text_models, tiny
from oracle.predictor import Predictor
from schedules import (
    built_chunks,
    gradient_errors,
    logits_of,
    number,
    train_step,
    whole_gradients,
)

EVEN_VISION_HEADS = {"vision_config": {"num_heads": 6}}
BALANCE = {"moe_aux_loss_coeff": 10.0}
PREDICTOR = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 40.0}
MTP_CONFIG = {"text_config": {"mtp_num_hidden_layers": 1}}
EMBEDDING = "embedding.word_embeddings.weight"
LENGTH = 112
EIGHT_EXPERTS = {"text_config": {"num_experts": 8}}
EIGHT_EXPERTS_MTP = {"text_config": {"num_experts": 8, "mtp_num_hidden_layers": 1}}
DEEP = {"vision_config": {"deepstack_visual_indexes": [0, 1, 3], "num_heads": 6}}
TIED = {"tie_word_embeddings": True}
# model: (case of tiny.CASES or class of text_models, entries of its config, fields in every run)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vl": ("qwen3_vl", {}, {}),
    "vl_tied": ("qwen3_vl", TIED, {}),
    "vl_deep": ("qwen3_vl", DEEP, {}),
    "vl_moe": ("qwen3_vl_moe", EIGHT_EXPERTS, BALANCE),
    "hybrid": ("qwen3_5-3x_value_heads-one_kv_head", {}, {}),
    "hybrid_mtp": ("qwen3_5-3x_value_heads-one_kv_head", MTP_CONFIG, PREDICTOR),
    "hybrid_mtp_tied": ("qwen3_5-3x_value_heads-one_kv_head", MTP_CONFIG | TIED, PREDICTOR),
    "hybrid_moe_mtp": ("qwen3_5_moe-2x_value_heads", EIGHT_EXPERTS_MTP, BALANCE | PREDICTOR),
    "text": ("Qwen3ForCausalLM", {}, {}),
    "text_moe": ("Qwen3MoeForCausalLM", {}, BALANCE),
    "text_mtp": ("Qwen3_5ForCausalLM", {"mtp_num_hidden_layers": 1}, PREDICTOR),
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
    "even": ("hybrid", pipeline()),
    "predictors": ("hybrid_mtp", pipeline("Etttt|ttmL")),
    "predictors_tied": ("hybrid_mtp_tied", pipeline()),
    "predictors_on_a_chunk": ("hybrid_moe_mtp", pipeline("Et|t|tt|tmL")),
    "predictors_before_the_last": ("hybrid_mtp", pipeline("Ettttttm|L")),
    "text": ("text", pipeline("Etttt|tL")),
    "text_predictors": ("text_mtp", pipeline("Ettt|ttmL")),
}


TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
OF_FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "deepstack_on_three_stages": ("vl_deep", pipeline("Et|t|t|ttL", 4)),
    "deepstack_on_three_stages_recomputed": ("vl_deep", pipeline("Et|t|t|ttL", 4) | RECOMPUTE),
    "deepstack_on_five_chunks": ("vl_deep", pipeline("E|t|t|t|t||t|L", 4)),
    "tied_chunks": ("vl_tied", pipeline("E|t|t|t|t||t|L", 4)),
    "no_layer_on_two_stages": ("vl_moe", pipeline("E||ttt|ttL", 4)),
    "embedding_is_a_layer": ("vl", pipeline(account_for_embedding_in_pipeline_split=True)),
    "predictors_before_the_last_tied": ("hybrid_mtp_tied", pipeline("Ettttttm|L")),
    "replicas": ("vl_deep", pipeline("Et|ttttL")),
    "tensor": ("vl_deep", TENSOR | pipeline("Et|ttttL")),
    "tensor_and_chunks": ("vl_deep", TENSOR | pipeline("Et|t|tt|tL")),
    "tensor_recomputed": ("vl_moe", TENSOR | RECOMPUTE | pipeline("Et|ttttL")),
    "experts": ("vl_moe", {"expert_model_parallel_size": 2} | pipeline("Et|ttttL")),
    "experts_and_predictors": (
        "hybrid_moe_mtp",
        {"expert_model_parallel_size": 2} | pipeline("Etttt|tmL"),
    ),
    "tensor_and_predictors": ("hybrid_moe_mtp", TENSOR | pipeline("Etttt|tmL")),
    "tensor_and_tied_predictors": ("hybrid_mtp_tied", TENSOR | pipeline("Etttt|ttmL")),
    "predictors_on_a_stage": ("hybrid_mtp", pipeline("Ettt|tt|tm|L", 4)),
    "predictors_on_a_stage_tied": ("hybrid_mtp_tied", pipeline("Ettt|tt|tm|L", 4)),
    "predictors_alone_on_a_stage": ("hybrid_moe_mtp", pipeline("Ettt|tt|m|L", 4)),
    "predictors_recomputed": ("hybrid_mtp", pipeline("Ett|tt|tt|mL", 4) | RECOMPUTE),
    "uneven": ("hybrid", pipeline(stages=4, num_layers_in_first_pipeline_stage=3)),
    "embedding_and_loss_are_layers": (
        "hybrid",
        pipeline(
            stages=4,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
        ),
    ),
    "text": ("text", pipeline("Et|t|tt|tL", 4)),
    "text_tensor": ("text_moe", TENSOR | pipeline("Et|t|tt|tL")),
    "text_predictors_on_a_stage": ("text_mtp", pipeline("Ettt|tt|m|L", 4)),
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


def save_references(_rank: int, folder: str, models: set[str]) -> None:
    """In a process of its own: the schedules leave scales of losses behind."""
    for model in models:
        save_reference(Path(folder), model)


def save_reference(folder: Path, model: str) -> None:
    """The files, and the logits and gradients of one process."""
    name, entries, fields = MODELS[model]
    if name in text_models.MODELS:
        hf = text_models.build(name, **entries)
        text_models.save(hf, folder / model)
        if "mtp_num_layers" in fields:
            text_models.add_predictor(folder / model)
    else:
        processor = tiny.build_processor()
        hf = tiny.build_hf_model(tiny.build_case(processor, name, **EVEN_VISION_HEADS | entries))
        hf.save_pretrained(folder / model)
        processor.save_pretrained(folder / model)
        if "mtp_num_layers" in fields:
            Predictor(hf).add_to(folder / model)
    batches = batches_of(model)
    with torch.no_grad():
        theirs = [hf(**one, use_cache=False).logits for one in without_labels(batches)]
    with built_chunks(folder / model, fields, wrap_with_ddp=True) as chunks:
        logits = logits_of(chunks, without_labels(batches))
        loss = train_step(chunks, batches)
        gradients = whole_gradients(chunks)
    reference = {"hf": theirs, "logits": logits, "loss": loss, "gradients": gradients}
    torch.save(reference | {"batches": batches}, folder / f"{model}.pt")


def difference(logits: Tensor, theirs: Tensor, batch: dict[str, Tensor]) -> float:
    """The largest of real tokens, over the largest logit."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    error = (logits[..., : theirs.shape[-1]] - theirs)[real].abs().max()
    return number(error / theirs.abs().max())


def run_case(folder: Path, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    reference = torch.load(folder / f"{model}.pt")
    batches, found = reference["batches"], {}
    fields = MODELS[model][2] | fields
    with built_chunks(folder / model, fields, wrap_with_ddp=True) as chunks:
        logits = logits_of(chunks, without_labels(batches))
        loss = train_step(chunks, batches)
        found["gradients"] = gradient_errors(chunks, reference["gradients"])
    if logits:
        found["logits"] = max(map(difference, logits, reference["hf"], batches))
        found["loss"] = max(
            number((mine - theirs).abs().max())
            for mine, theirs in zip(loss, reference["loss"], strict=True)
        )
        pairs = zip(logits + loss, reference["logits"] + reference["loss"], strict=True)
        found["same"] = all(
            mine.shape == one.shape and torch.equal(mine, one) for mine, one in pairs
        )
        found["losses"] = [float(one.sum()) for one in loss]
    return found


def worker(rank: int, folder: str, cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    results = {case: run_case(Path(folder), *cases[case]) for case in cases}
    torch.save(results, f"{folder}/results{rank}.pt")


def results_of(
    folder: Path, cases: dict[str, tuple[str, dict[str, Any]]], world: int
) -> list[dict[str, Any]]:
    """What each rank found, case by case."""
    run_ranks(save_references, str(folder), {model for model, _ in cases.values()}, world=1)
    run_ranks(worker, str(folder), cases, world=world, seconds=900)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(world)]


def check(model: str, fields: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """What all ranks found of a case."""
    last = [found for found in results if "logits" in found]
    ranks_of_stage = len(results) // fields["pipeline_model_parallel_size"]
    assert len(last) == ranks_of_stage
    # A pipeline alone moves work, and computes all of it in the same order.
    moves = ranks_of_stage == 1 and "recompute_granularity" not in fields
    for found in last:
        assert found["logits"] <= 1e-4
        assert found["loss"] <= 1e-4
        assert found["same"] or not moves
    errors = [found["gradients"] for found in results]
    assert len({key for one in errors for key in one}) > (10 if "text" in model else 40)
    for one in errors:
        # The sum over the places where this weight is used begins with those of each stage.
        if moves and ("tied" in model or "mtp" in model):
            for key in [key for key in one if key.endswith(EMBEDDING)]:
                assert one.pop(key) <= 1e-6
        assert not {key: error for key, error in one.items() if error > (0 if moves else 1e-3)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(tmp_path_factory.mktemp("two"), CASES, 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(two_ranks: list[dict[str, Any]], case: str) -> None:
    check(*CASES[case], [found[case] for found in two_ranks])


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(tmp_path_factory.mktemp("four"), OF_FOUR, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_FOUR)
def test_four_ranks(four_ranks: list[dict[str, Any]], case: str) -> None:
    check(*OF_FOUR[case], [found[case] for found in four_ranks])


def test_a_step_depends_on_every_batch(two_ranks: list[dict[str, Any]]) -> None:
    """The comparison would notice a batch that is left out: no two losses are alike."""
    [losses] = [
        found["uneven_tied"]["losses"] for found in two_ranks if "logits" in found["uneven_tied"]
    ]
    assert len(set(losses)) == 4
