"""Context parallelism in gloo processes, beside every other kind, against one process.

Logits are transformers', of the tokens that a rank has; gradients are those of our model in one
process, which the oracle tests compare with transformers. megatron-core's schedules run the model,
its own function cuts the labels, and its DistributedDataParallel reduces the gradients. Batches
with pictures on all ranks, with pictures on one rank and with none follow one another. The
processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from forked import run_ranks
from oracle import text_models, tiny
from schedules import built_chunks, gradient_errors, logits_of, number, train_step, whole_gradients

EVEN_VISION_HEADS = {"vision_config": {"num_heads": 6}}
BALANCE = {"moe_aux_loss_coeff": 10.0}
FOUR_KEY_HEADS = {"text_config": {"linear_num_key_heads": 4, "linear_num_value_heads": 8}}
# model: (case of tiny.CASES or class of text_models, entries of its config, fields in every run)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vl": ("qwen3_vl", {}, {}),
    "vl_moe": ("qwen3_vl_moe", {"text_config": {"num_experts": 8}}, BALANCE),
    "counted_together": (
        "qwen3_vl_moe",
        {"text_config": {"output_router_logits": True, "router_aux_loss_coef": 10.0}},
        {},
    ),
    "hybrid": ("qwen3_5-3x_value_heads-one_kv_head", {}, {}),
    "hybrid_moe": ("qwen3_5_moe-2x_value_heads", FOUR_KEY_HEADS, BALANCE),
    "text": ("Qwen3_5ForCausalLM", {}, {}),
}
CONTEXT = {"context_parallel_size": 2}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
PIPELINE = {"pipeline_model_parallel_size": 2}
# case: (model, batches, fields of the provider), by the number of ranks
CASES: dict[int, dict[str, tuple[str, str, dict[str, Any]]]] = {
    2: {
        "padded": ("vl", "padded", CONTEXT),
        "experts": ("vl_moe", "padded", CONTEXT | {"expert_model_parallel_size": 2}),
        "experts_counted_together": ("counted_together", "padded", CONTEXT),
        "hybrid": ("hybrid", "padded", CONTEXT | RECOMPUTE),
        "hybrid_experts_packed": ("hybrid_moe", "packed", CONTEXT),
        "text": ("text", "text", CONTEXT),
    },
    4: {
        "sequence_padded": ("vl", "padded", CONTEXT | SEQUENCE),
        "sequence_packed": ("vl", "packed", CONTEXT | SEQUENCE),
        "sequence_hybrid_packed": ("hybrid_moe", "packed", CONTEXT | SEQUENCE),
        "sequence_hybrid": ("hybrid_moe", "padded", CONTEXT | SEQUENCE | RECOMPUTE),
        "sequence_counted_together": ("counted_together", "padded", CONTEXT | SEQUENCE),
        "pipeline": (
            "vl",
            "padded",
            CONTEXT | PIPELINE | {"pipeline_model_parallel_layout": "Et|ttttL"},
        ),
        "pipeline_hybrid": ("hybrid", "padded", CONTEXT | PIPELINE),
        "experts": ("vl_moe", "padded", CONTEXT | {"expert_model_parallel_size": 4}),
        "four": ("vl", "padded", {"context_parallel_size": 4}),
        "four_packed": ("hybrid_moe", "packed", {"context_parallel_size": 4}),
    },
}


def padded_batches() -> list[dict[str, Tensor]]:
    """Rows of 112 tokens: pictures on all of two ranks and on one, pictures on one alone, none."""
    processor = tiny.build_processor()
    [china, flower] = [one.resize((160, 128)) for one in tiny.photographs()]
    prompts: list[tuple[list[str], list[Any]]] = [
        ([f"Of this one {tiny.IMAGE} and", f"See {tiny.IMAGE} now"], [china, flower]),
        (["Only words, and of these a few.", f"{tiny.IMAGE}!"], [flower]),
        (["No picture at all", "here."], []),
    ]
    found = [
        tiny.prompt(
            processor,
            text,
            **({"images": images} if images else {}),
            padding="max_length",
            max_length=112,
            padding_side="right",
        )
        for text, images in prompts
    ]
    for one in found:
        labels = one["input_ids"].roll(-1, dims=1)
        labels[(one["mm_token_type_ids"] != 0) | (one["attention_mask"] == 0)] = -100
        one["labels"] = labels
    return found


def text_batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 300, (2, 24), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    labels = ids.roll(-1, 1).masked_fill(mask == 0, -100)
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels}]


class Pack:
    """Where the rows of a batch go in a pack in which each is filled up to a multiple of 8."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.lengths = (-(-self.mask.sum(1) // 8) * 8).tolist()

    def __call__(self, rows: Tensor, fill: int = 0) -> Tensor:
        parts = [row[real] for row, real in zip(rows, self.mask, strict=True)]
        filled = []
        for part, length in zip(parts, self.lengths, strict=True):
            rest = part.new_full((length - len(part), *part.shape[1:]), fill)
            filled.append(torch.cat([part, rest]))
        return torch.cat(filled)[None]

    @property
    def params(self) -> PackedSeqParams:
        boundaries = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int()
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            cu_seqlens_q_padded=boundaries,
            cu_seqlens_kv_padded=boundaries,
            max_seqlen_q=max(self.lengths),
            max_seqlen_kv=max(self.lengths),
        )


def packed(batch: dict[str, Any], *, by_the_model: bool) -> dict[str, Any]:
    """The rows as they are, to be packed by the model; or packed already."""
    pack = Pack(batch["attention_mask"])
    found = batch | {"packed_seq_params": pack.params, "labels": pack(batch["labels"], -100)}
    if by_the_model:
        return found
    del found["attention_mask"]
    names = ("input_ids", "mm_token_type_ids")
    return found | {name: pack(batch[name]) for name in names}


def batches_of(kind: str) -> list[dict[str, Any]]:
    if kind == "text":
        return text_batches()
    batches: list[dict[str, Any]] = padded_batches()
    if kind == "packed":
        return [packed(one, by_the_model=index < 1) for index, one in enumerate(batches)]
    return batches


def cut(whole: Tensor, dim: int, lengths: list[int], ranks: int, rank: int) -> Tensor:
    """Of each of the sequences, chunks r and 2n - 1 - r."""
    parts = []
    for sequence in whole.split(lengths, dim):
        chunks = sequence.chunk(2 * ranks, dim)
        parts += [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(parts, dim)


def without_labels(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: one[key] for key in one if key != "labels"} for one in batches]


def save_reference(folder: Path, model: str, kinds: set[str]) -> None:
    """The files; logits of transformers and gradients of one process for each kind of batch."""
    name, entries, fields = MODELS[model]
    if name in text_models.MODELS:
        hf = text_models.build(name, **entries)
        text_models.save(hf, folder / model)
    else:
        processor = tiny.build_processor()
        hf = tiny.build_hf_model(tiny.build_case(processor, name, **EVEN_VISION_HEADS, **entries))
        hf.save_pretrained(folder / model)
        processor.save_pretrained(folder / model)
    for kind in kinds:
        rows = text_batches() if kind == "text" else padded_batches()
        with torch.no_grad():
            logits = [hf(**one, use_cache=False).logits for one in without_labels(rows)]
        real = [one["attention_mask"].bool() for one in rows]
        if kind == "packed":
            packs = [Pack(mask) for mask in real]
            logits = [pack(one) for pack, one in zip(packs, logits, strict=True)]
            real = [pack(one) for pack, one in zip(packs, real, strict=True)]
        with built_chunks(folder / model, fields, wrap_with_ddp=True) as chunks:
            loss = train_step(chunks, batches_of(kind))
            gradients = whole_gradients(chunks)
        reference = {"logits": logits, "real": real, "loss": loss, "gradients": gradients}
        torch.save(reference, folder / f"{model}.{kind}.pt")


def run_case(folder: Path, model: str, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.utils import _get_batch_on_this_cp_rank_per_sequence_balancing

    reference = torch.load(folder / f"{model}.{kind}.pt")
    batches, found = batches_of(kind), {}
    fields = MODELS[model][2] | fields
    with built_chunks(folder / model, fields, wrap_with_ddp=True) as chunks:
        group = parallel_state.get_context_parallel_group()

        def of_rank(whole: Tensor, batch: dict[str, Any]) -> Tensor:
            lengths = [whole.shape[1]]
            if (packing := batch.get("packed_seq_params")) is not None:
                lengths = packing.cu_seqlens_q.diff().tolist()
            return cut(whole, 1, lengths, group.size(), group.rank())

        for batch in batches:
            labels = of_rank(batch["labels"], batch)
            if kind == "text" or (kind == "packed" and batch is batches[-1]):
                # A model of text takes what trainers cut; of a pack the length tells.
                names = ("input_ids", "attention_mask", "mm_token_type_ids")
                batch |= {name: of_rank(batch[name], batch) for name in names if name in batch}
            if "packed_seq_params" not in batch:
                theirs = _get_batch_on_this_cp_rank_per_sequence_balancing(
                    {"labels": batch["labels"]}, group
                )
                assert torch.equal(labels, theirs["labels"])
            batch["labels"] = labels
        logits = logits_of(chunks, without_labels(batches))
        loss = train_step(chunks, batches)
        found["gradients"] = gradient_errors(chunks, reference["gradients"])
        if logits:
            found["logits"] = found["loss"] = 0.0
        for index, mine in enumerate(logits):
            whole = reference["logits"][index]
            expected = of_rank(whole, batches[index])
            real = of_rank(reference["real"][index], batches[index])
            errors = (mine[..., : expected.shape[-1]] - expected)[real].abs() / whole.abs().max()
            if errors.numel():  # a rank may have nothing but padding
                found["logits"] = max(found["logits"], number(errors.max()))
            expected = of_rank(reference["loss"][index], batches[index])
            assert loss[index].shape == expected.shape
            found["loss"] = max(found["loss"], number((loss[index] - expected).abs().max()))
    return found


def worker(rank: int, folder: str, world: int) -> None:
    results = {case: run_case(Path(folder), *CASES[world][case]) for case in CASES[world]}
    torch.save(results, f"{folder}/results{rank}.pt")


def save_references(_: int, folder: str, world: int) -> None:
    cases = CASES[world].values()
    for model in {model for model, _, _ in cases}:
        save_reference(Path(folder), model, {kind for one, kind, _ in cases if one == model})


def results_of(folder: Path, world: int) -> list[dict[str, Any]]:
    """What each rank found, case by case."""
    run_ranks(save_references, str(folder), world, world=1)
    run_ranks(worker, str(folder), world, world=world, seconds=900)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(tmp_path_factory.mktemp("four"), 4)


def assert_right(results: list[dict[str, Any]], case: str) -> None:
    last = [ranks[case] for ranks in results if "logits" in ranks[case]]
    assert len(last) == (len(results) // 2 if "pipeline" in case else len(results))
    for found in last:
        assert found["logits"] <= 1e-4
        assert found["loss"] <= 1e-4
    for ranks in results:
        errors = ranks[case]["gradients"]
        assert len(errors) >= 10  # of the last of two stages
        assert max(errors.values()) <= 1e-3, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", CASES[2])
def test_on_two_ranks(two: list[dict[str, Any]], case: str) -> None:
    assert_right(two, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[4])
def test_on_four_ranks(four: list[dict[str, Any]], case: str) -> None:
    assert_right(four, case)


def test_where_the_pictures_are() -> None:
    """On all ranks and on one only, as the cases need."""
    found = set()
    for batch in padded_batches():
        parts = [cut(batch["mm_token_type_ids"], 1, [112], 2, rank) for rank in range(2)]
        found.add(tuple(bool(part.any()) for part in parts))
    assert found == {(True, True), (True, False), (False, False)}
