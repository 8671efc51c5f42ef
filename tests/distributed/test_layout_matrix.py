"""Models at the layouts of `layouts.py`, in gloo processes, against one process.

Logits are transformers', and those of our model in one process bit for bit where a layout only
moves work: pipelines and replicas. Gradients and losses of training are those of our model in one
process, which the oracle tests compare with transformers. megatron-core's own schedules,
DistributedDataParallel and optimizers run the model; batches with pictures, with a video and
without either follow one another. Each model has its weights by `load_hf_weights` and from a
checkpoint that `import` wrote. Each layout has processes of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layout_batches
from forked import run_ranks
from layout_batches import batches_of, cut, of_rank, padded_batches, without_labels
from layouts import LAYOUTS, MODELS, Layout
from oracle import text_models, tiny
from oracle.predictor import Predictor
from schedules import Batch, gradient_errors, logits_of, number, whole_gradients
from trained_models import Trained, Training, build, of_replica

STEPS = 3
EMBEDDING = "embedding.word_embeddings.weight"
SHARDED = {"use_distributed_optimizer": True}


def is_text(model: str) -> bool:
    return MODELS[model].source in text_models.MODELS


def training_of(model: str, fields: dict[str, Any], ddp: dict[str, Any]) -> Training:
    one = MODELS[model]
    # With the loss of tokens, megatron-core weighs the balance of experts by the tokens of each
    # part of the sequence, which hold unequal parts of the padding (moe/router.py:629 of 0.19.2).
    provider = {"make_vocab_size_divisible_by": 64, "calculate_per_token_loss": not one.has_experts}
    return Training(model, provider | one.fields | fields, ddp, one.optimizer)


# In a process of its own: what one process finds.


def save_model(folder: Path, model: str) -> Any:
    """The files of a model, and the model of transformers."""
    one = MODELS[model]
    if is_text(model):
        hf = text_models.build(one.source, **one.text | one.entries)
        text_models.save(hf, folder)
        if one.fields.get("mtp_num_layers"):
            text_models.add_predictor(folder)
        return hf
    processor = tiny.build_processor()
    config = tiny.build_case(processor, one.source, text_config=one.text, **one.entries)
    hf = tiny.build_hf_model(config)
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    if one.fields.get("mtp_num_layers"):
        Predictor(hf).add_to(folder)
    return hf


def save_reference(_rank: int, root: str, model: str, kind: str) -> None:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.operations.convert import import_checkpoint

    folder = Path(root)
    hf = save_model(folder / model, model)
    checkpoint = folder / f"{model}.megatron"
    import_checkpoint(PreTrainedVLM.from_pretrained(folder / model), checkpoint)
    rows, batches = (batches_of(one, of_text=is_text(model)) for one in ("padded", kind))
    with torch.no_grad():
        theirs = [hf(**one, use_cache=False).logits for one in without_labels(rows)]
    real = [one["attention_mask"].bool() for one in rows]
    if kind == "packed":
        packs = [layout_batches.Pack(mask) for mask in real]
        theirs = [pack(one) for pack, one in zip(packs, theirs, strict=True)]
        real = [pack(one) for pack, one in zip(packs, real, strict=True)]
    trained = build(training_of(model, {}, {}), folder)
    logits = logits_of(trained.chunks, without_labels(batches))
    found = {"batches": batches, "hf": theirs, "real": real, "logits": logits}
    found["steps"] = steps = []
    for _ in range(STEPS):
        loss = trained.backward(batches)
        found.setdefault("gradients", whole_gradients(trained.chunks))
        steps.append((loss, trained.update()[0]))
    torch.save(found, folder / f"{model}.{kind}.pt")


@dataclass
class References:
    """What one process finds, model by model as they are asked for."""

    root: Path

    def folder(self, model: str, kind: str) -> Path:
        folder = self.root / f"{model}.{kind}"
        if not folder.exists():
            folder.mkdir()
            run_ranks(save_reference, str(folder), model, kind, world=1)
        return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


# In every rank of a layout.


def worker(rank: int, folder: str, name: str) -> None:
    torch.save(run_layout(Path(folder), LAYOUTS[name]), f"{folder}/found{rank}.pt")


def run_layout(folder: Path, layout: Layout) -> dict[str, Any]:
    """How far this rank is from the reference."""
    model = layout.model
    reference = torch.load(folder / f"{model}.{layout.batches}.pt", weights_only=False)
    of_files = build(training_of(model, layout.fields, {}), folder)
    batches = Batches(layout, reference)
    found: dict[str, Any] = {}
    values = [one.detach().clone() for one in parameters_of(of_files)]
    logits = batches.logits(of_files)
    if logits:
        found["logits"] = batches.distance(logits)
        found["same"] = batches.are_same(logits)
        found["vocabulary"] = logits[0].shape[-1]
    found["steps"] = []
    for step in range(STEPS):
        loss = of_files.backward(batches.mine, batches.length)
        if step == 0:
            found["gradients"] = gradient_errors(of_files.chunks, reference["gradients"])
        found["steps"].append((loss, of_files.update()[0]))

    checkpoint = folder / f"{model}.megatron"
    training = training_of(model, layout.fields, SHARDED)
    of_checkpoint = build(training, folder, checkpoint=checkpoint)
    found["same values"] = equal(values, [one.detach() for one in parameters_of(of_checkpoint)])
    found["same logits"] = equal(logits, batches.logits(of_checkpoint))
    found["steps of checkpoint"] = [
        (of_checkpoint.backward(batches.mine, batches.length), of_checkpoint.update()[0])
        for _ in range(STEPS)
    ]
    found["expected"] = reference["steps"]
    return found


def parameters_of(trained: Trained) -> list[Tensor]:
    return [one for chunk in trained.chunks for one in chunk.parameters()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


class Batches:
    """What this rank has of the microbatches, and what is expected of them."""

    def __init__(self, layout: Layout, reference: dict[str, Any]) -> None:
        from megatron.core import parallel_state

        self.reference = reference
        group = parallel_state.get_context_parallel_group()
        whole = reference["batches"]
        self.length = whole[0]["labels"].shape[1] if layout.batches == "padded" else None
        self.indices = of_replica(range(len(whole)))
        self.mine: list[Batch] = []
        self.cuts = []
        for index in self.indices:
            # A model of text takes what trainers cut; of a pack the length tells.
            last_pack = layout.batches == "packed" and index == len(whole) - 1
            with_inputs = is_text(layout.model) or last_pack
            batch, part = of_rank(whole[index], group.size(), group.rank(), with_inputs=with_inputs)
            if layout.batches == "padded":
                assert torch.equal(batch["labels"], as_megatron_cuts(whole[index]["labels"], group))
            self.mine.append(batch)
            self.cuts.append(part)

    def logits(self, trained: Trained) -> list[Tensor]:
        return logits_of(trained.chunks, without_labels(self.mine), self.length)

    def distance(self, logits: list[Tensor]) -> float:
        """From transformers', of real tokens, over the largest."""
        found = 0.0
        for index, part, ours in zip(self.indices, self.cuts, logits, strict=True):
            theirs, real = self.reference["hf"][index], part(self.reference["real"][index])
            errors = (ours[..., : theirs.shape[-1]] - part(theirs))[real].abs() / theirs.abs().max()
            if errors.numel():  # a rank may have nothing but padding
                found = max(found, number(errors.max()))
        return found

    def are_same(self, logits: list[Tensor]) -> bool:
        """Bit for bit those of one process, what is predicted for padding included."""
        return equal(logits, [self.reference["logits"][index] for index in self.indices])


def as_megatron_cuts(labels: Tensor, group: Any) -> Tensor:
    from megatron.core.utils import _get_batch_on_this_cp_rank_per_sequence_balancing

    cut_batch = _get_batch_on_this_cp_rank_per_sequence_balancing({"labels": labels}, group)
    found: Tensor = cut_batch["labels"]
    return found


# What the ranks found.


def check(layout: Layout, results: list[dict[str, Any]], record: Any) -> None:
    last = [found for found in results if "logits" in found]
    assert len(last) == layout.ranks // layout.stages
    errors = [found["gradients"] for found in results]
    expected = results[0]["expected"]
    of_steps = [
        max(
            abs(step[place] / wanted[place] - 1)
            for found in results
            for kind in ("steps", "steps of checkpoint")
            for step, wanted in zip(found[kind], expected, strict=True)
        )
        for place in range(2)
    ]
    record("model", layout.model)
    record("ranks", layout.ranks)
    record("logits", max(found["logits"] for found in last))
    record("gradient", max(error for one in errors for error in one.values()))
    record("loss", of_steps[0])
    record("norm", of_steps[1])
    record("same", all(found["same"] for found in last))

    assert max(found["logits"] for found in last) <= 1e-4
    # Padding differs between layouts, and has no part in the loss.
    per_rank, ranks = 64, layout.fields.get("tensor_model_parallel_size", 1)
    whole = -(-tiny.VOCAB_SIZE // (per_rank * ranks)) * per_rank * ranks
    for found in last:
        assert found["vocabulary"] == whole
    assert len({key for one in errors for key in one}) > (10 if is_text(layout.model) else 40)
    # A pipeline computes everything in the same order, but for the sum over the places where the
    # weight of the embedding is used, which begins with those of each stage.
    exact = layout.is_pipeline_alone and "recompute_granularity" not in layout.fields
    for one in errors:
        if exact and MODELS[layout.model].shares_embedding:
            for key in [key for key in one if key.endswith(EMBEDDING)]:
                assert one.pop(key) <= 1e-6
        assert not {key: error for key, error in one.items() if error > (0 if exact else 1e-3)}
    assert expected[-1][0] < 0.9 * expected[0][0], "the steps have taught nothing"
    assert of_steps[0] <= 1e-5
    for found in results:
        assert found["same values"]
        assert found["same logits"]
    if layout.only_moves_work:
        assert all(found["same"] for found in last)


NAMES = [
    pytest.param(name, marks=() if layout.fast else pytest.mark.slow)
    for name, layout in LAYOUTS.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_layout(references: References, name: str, record_property: Any) -> None:
    layout = LAYOUTS[name]
    folder = references.folder(layout.model, layout.batches)
    run_ranks(worker, str(folder), name, world=layout.ranks, seconds=300)
    results = [torch.load(folder / f"found{rank}.pt") for rank in range(layout.ranks)]
    check(layout, results, record_property)


def test_where_the_pictures_are() -> None:
    """Of two context-parallel ranks: on both, on one and on none."""
    found = set()
    for batch in padded_batches():
        parts = [cut(batch["mm_token_type_ids"], 1, [112], 2, rank) for rank in range(2)]
        found.add(tuple(bool(part.any()) for part in parts))
    assert found >= {(True, True), (True, False), (False, False)}
