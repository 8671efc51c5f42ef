"""What is wrong with a batch, every pipeline stage refuses, and none waits for one that has."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.errors import InputError
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.decoder_spec import decoder_spec
from oracle import text_models, tiny
from schedules import built_chunks, logits_of

SECONDS = 120
PIPELINE = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|ttttL"}
GRID = torch.tensor([[1, 4, 6]])
PIXELS = torch.zeros(24, 3 * 2 * 16 * 16)
POSITIONS = torch.zeros(3, 2, 12).long()
NO_PICTURES = {"pixel_values": None, "image_grid_thw": None}


def pack(qkv_format: str = "thd", **boundaries: list[int]) -> PackedSeqParams:
    """Boundaries by the ends of their names; those of keys are those of queries."""
    boundaries = {"kv": boundaries.get("q", [0, 12, 24]), **boundaries}
    found: dict[str, Any] = {
        f"cu_seqlens_{k}": torch.tensor(ends) for k, ends in boundaries.items()
    }
    return PackedSeqParams(qkv_format=qkv_format, **found)


PACK = pack(q=[0, 7, 12])
# what is wrong: (model, arguments over those of a batch, what every stage says)
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no pictures": ("vl", {"pixel_values": None, "image_grid_thw": None}, "give 0 features"),
    "no pictures, positions given": (
        "vl",
        {"pixel_values": None, "image_grid_thw": None, "position_ids": POSITIONS},
        "6 image tokens (id 261), and the images give 0 features",
    ),
    "too many pictures": (
        "vl",
        {"pixel_values": PIXELS.repeat(2, 1), "image_grid_thw": GRID.repeat(2, 1)},
        "give 12 features",
    ),
    "no grid": ("vl", {"image_grid_thw": None}, "pixel_values was given without image_grid_thw"),
    "no pixels": ("vl", {"pixel_values": None}, "image_grid_thw was given without pixel_values"),
    "pixels cut": ("vl", {"pixel_values": PIXELS[:20]}, "asks for [24, 1536]"),
    "an odd grid": ("vl", {"image_grid_thw": torch.tensor([[1, 3, 8]])}, "not a multiple of"),
    "two frames": ("vl", {"image_grid_thw": torch.tensor([[2, 2, 6]])}, "an image of 2 frames"),
    "a long mask": (
        "vl",
        {"attention_mask": torch.ones(2, 13)},
        "expected [2, 12] with 1 for real tokens",
    ),
    "one position": ("vl", {"position_ids": POSITIONS[:1]}, "position_ids has shape [1, 2, 12]"),
    "few labels": ("vl", {"labels": torch.zeros(2, 11).long()}, "labels has shape [2, 11]"),
    "a small pack": (
        "vl",
        {"packed_seq_params": PACK},
        "have [12, 12] real tokens, and their sequences in packed_seq_params [7, 5]",
    ),
    "no type of each token": (
        "vl",
        {"mm_token_type_ids": torch.zeros(2, 11).long()},
        "mm_token_type_ids has shape [2, 11], expected [2, 12]",
    ),
    "no such type": ("vl", {"mm_token_type_ids": torch.full((2, 12), 3)}, "has 3: expected 0 to 2"),
    "one row without a batch": ("vl", {"input_ids": torch.arange(12)}, "is of shape [12]"),
    "no tokens": ("vl", {"input_ids": torch.zeros(2, 0).long()}, "is of shape [2, 0]"),
    "tokens of another model": (
        "vl",
        NO_PICTURES | {"input_ids": torch.full((2, 12), 307)},
        "input_ids has 307: expected 0 to 306",
    ),
    "the placeholder of a client": (
        "vl",
        NO_PICTURES | {"input_ids": torch.full((2, 12), -200)},
        "input_ids has -200: expected 0 to 306",
    ),
    "another ignored label": (
        "vl",
        {"labels": torch.full((2, 12), -1)},
        "labels has -1: expected 0 to 306, or -100 for a token without a loss",
    ),
    "labels that are no numbers": ("vl", {"labels": torch.zeros(2, 12)}, "expected integers"),
    "a grid of fractions": ("vl", {"image_grid_thw": GRID / 2}, "integers from 1"),
    "a list of grids": ("vl", {"image_grid_thw": GRID.tolist()}, "is of type list"),
    "another format of packs": ("vl", {"packed_seq_params": pack("sbhd")}, "is 'sbhd'"),
    "no boundaries": (
        "vl",
        {"packed_seq_params": PackedSeqParams(qkv_format="thd")},
        "packed_seq_params.cu_seqlens_q is None",
    ),
    "boundaries that go back": (
        "vl",
        {"packed_seq_params": pack(q=[0, 12, 7, 24])},
        "packed_seq_params.cu_seqlens_q is [0, 12, 7, 24]: expected integers",
    ),
    "boundaries from a later token": (
        "vl",
        {"packed_seq_params": pack(q=[2, 14, 26])},
        "packed_seq_params.cu_seqlens_q is [2, 14, 26]: expected integers",
    ),
    "keys of other sequences": (
        "vl",
        {"packed_seq_params": pack(q=[0, 12, 24], kv=[0, 10, 24])},
        "cu_seqlens_kv differs from cu_seqlens_q",
    ),
    "more tokens than room": (
        "vl",
        {
            "packed_seq_params": pack(
                q=[0, 12, 24], q_padded=[0, 11, 24], kv=[0, 12, 24], kv_padded=[0, 11, 24]
            )
        },
        "cu_seqlens_q has sequences of [12, 12] tokens, and cu_seqlens_q_padded room for [11, 13]",
    ),
    "a size of context parallelism of its own": (
        "vl",
        {"packed_seq_params": replace(PACK, local_cp_size=2)},
        "packed_seq_params.local_cp_size is 2",
    ),
    "a state": ("vl", {"inference_context": object()}, "inference_context was given"),
    "labels of a classifier": (
        "classifier",
        {"input_ids": torch.arange(12)[None], "labels": torch.zeros(1, 12).long()},
        "labels were given to a classifier",
    ),
    "no padding token": ("classifier", {}, "has 2 sequences, and the config has no pad_token_id"),
}


def batch_of(model: str) -> dict[str, Any]:
    ids = torch.arange(2 * 12).view(2, 12)
    if model == "classifier":
        return {"input_ids": ids}
    ids[0, 3:9] = 261
    return {"input_ids": ids, "pixel_values": PIXELS, "image_grid_thw": GRID}


def refusal_of(function: Any, batch: dict[str, Any]) -> str:
    try:
        function(**batch)
    except InputError as error:
        return str(error)
    return "not refused"


def ask_every_stage(rank: int, folder: str) -> None:
    found: dict[str, tuple[str, str]] = {}
    for model in ("vl", "classifier"):
        with built_chunks(Path(folder, model), PIPELINE) as [chunk]:
            for name, (wrong_model, arguments, _) in WRONG.items():
                if wrong_model == model:
                    batch = batch_of(model) | arguments
                    found[name] = refusal_of(chunk.check_inputs, batch), refusal_of(chunk, batch)
            right = batch_of(model)
            if model == "classifier":
                right["input_ids"] = right["input_ids"][:1]
            found[f"right for {model}"] = (refusal_of(chunk.check_inputs, right), "")
    with built_chunks(Path(folder, "text"), PIPELINE) as [chunk]:
        # A client packs the rows on the first stage alone, and gives the positions of the rows.
        rows = torch.arange(2 * 12).view(2, 12)
        lengths = {"packed_seq_params": pack(q=[0, 10, 20])}
        positions = {"position_ids": torch.arange(12).clamp(max=9).expand(2, 12)}
        own = {"input_ids": rows[:, :10].reshape(1, 20) if rank == 0 else rows}
        refusal = refusal_of(chunk.check_inputs, own | lengths | positions)
        strange = {"position_ids": positions["position_ids"] + 1}
        found["right for text"] = refusal, refusal_of(chunk.check_inputs, own | lengths | strange)
    torch.save(found, f"{folder}/refusals{rank}.pt")


def refuse_in_a_schedule(rank: int, folder: str) -> None:
    """The second of four batches is wrong; each rank says how it ended, and when."""
    batches = [batch_of("vl") for _ in range(4)]
    batches[1]["pixel_values"] = PIXELS[:20]
    with built_chunks(Path(folder, "vl"), PIPELINE) as chunks:
        begun, ended = time.monotonic(), "not refused"
        try:
            logits_of(chunks, batches)
        except (InputError, RuntimeError) as error:
            ended = f"{type(error).__name__}: {error}"
        torch.save((ended, time.monotonic() - begun), f"{folder}/schedule{rank}.pt")


def build_in_vain(rank: int, folder: str) -> None:
    """The layers of the second stage cannot be made; each rank says how it ended."""
    provider = AutoBridge.from_hf_pretrained(Path(folder, "vl")).to_megatron_provider()
    provider.set_fields(PIPELINE)
    if rank == 1:
        provider.transformer_layer_spec = layers_without_attention
    ended = refusal_of(provider.provide_distributed_model, {"wrap_with_ddp": False})
    torch.save(ended, f"{folder}/built{rank}.pt")


def layers_without_attention(config: Any, vp_stage: int | None = None) -> Any:
    block = decoder_spec(config, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.self_attention = None
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    processor = tiny.build_processor()
    vl = tiny.build_hf_model(tiny.build_case(processor, "qwen3_vl"))
    vl.save_pretrained(folder / "vl")
    processor.save_pretrained(folder / "vl")
    name = "Qwen3ForSequenceClassification"
    text_models.save(text_models.build(name, pad_token_id=None), folder / "classifier")
    text_models.save(text_models.build("Qwen3ForCausalLM"), folder / "text")
    return folder


@pytest.fixture(scope="module")
def refusals(folder: Path) -> list[dict[str, tuple[str, str]]]:
    run_ranks(ask_every_stage, str(folder), seconds=SECONDS)
    return [torch.load(folder / f"refusals{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrong", WRONG)
def test_every_stage_refuses(refusals: list[dict[str, tuple[str, str]]], wrong: str) -> None:
    """By `forward`, before anything is sent, and by `check_inputs` in the same words."""
    messages = {message for rank in refusals for message in rank[wrong]}
    assert len(messages) == 1, messages
    assert WRONG[wrong][2] in messages.pop()


def test_every_stage_accepts(refusals: list[dict[str, tuple[str, str]]]) -> None:
    for rank in refusals:
        assert rank["right for vl"][0] == rank["right for classifier"][0] == "not refused"
        right, strange = rank["right for text"]
        assert right == "not refused"
        assert strange.endswith(
            "expected [1, 20] like input_ids, or None, which counts each sequence from 0"
        )


def test_nobody_waits_for_a_stage_that_has_refused(folder: Path) -> None:
    """The first stage refuses in the middle of a schedule, and its process ends: so do all."""
    run_ranks(refuse_in_a_schedule, str(folder), seconds=SECONDS)
    (first, _), (second, seconds) = (torch.load(folder / f"schedule{rank}.pt") for rank in range(2))
    assert first.startswith("InputError: pixel_values has shape [20, 1536]")
    assert second != "not refused"
    assert seconds < SECONDS / 2


def test_no_rank_goes_on_where_another_cannot_build(folder: Path) -> None:
    run_ranks(build_in_vain, str(folder), seconds=SECONDS)
    first, second = (torch.load(folder / f"built{rank}.pt") for rank in range(2))
    assert first.startswith("rank 1 cannot go on: Qwen3VLModelProvider cannot be built: ")
    assert second.startswith("Qwen3VLModelProvider cannot be built: AttributeError ")
