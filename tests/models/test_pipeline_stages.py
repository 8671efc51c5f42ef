"""Which layers a pipeline stage has: said without ranks, and the same as megatron-core says."""

from __future__ import annotations

import random
import re
from difflib import SequenceMatcher
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.nearest_layout import nearest_layout
from megatron.bridge.models.pipeline_stages import (
    embedding_stages,
    pipeline_stages,
    stage_index,
    virtual_stages,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.stage_boundary import stage_boundaries
from megatron.bridge.runtime.parallel import fake_cluster
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from providers import small_provider, small_vision

INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def drawn_pipeline(draw: random.Random) -> dict[str, Any]:
    """Fields of a pipeline, about half of which megatron-core can have."""
    stages, chunks = draw.randint(2, 4), draw.choice([None, 2, 3])
    fields: dict[str, Any] = {"pipeline_model_parallel_size": stages, "num_layers": 12}
    kind = draw.choice(["even", "uneven", "account", "layout"])
    if kind == "layout":
        rows = [""] * stages * (chunks or 1)
        for _ in range(12):
            rows[draw.randrange(len(rows))] += "t"
        fields["pipeline_model_parallel_layout"] = f"E{'|'.join(rows)}L"
    elif chunks is not None:
        fields["virtual_pipeline_model_parallel_size"] = chunks
    if kind == "uneven":
        fields["num_layers_in_first_pipeline_stage"] = draw.randint(1, 8)
        if draw.random() < 0.5:
            fields["num_layers_in_last_pipeline_stage"] = draw.randint(1, 8)
    if kind == "account":
        fields["num_layers"] = draw.choice([10, 11, 12])
        fields["account_for_embedding_in_pipeline_split"] = True
        fields["account_for_loss_in_pipeline_split"] = draw.random() < 0.5
    return fields | INTERLEAVED


def test_layers_are_where_megatron_core_has_them() -> None:
    """All of a model's, once, each where a rank of the pipeline looks for it."""
    draw, legal, refused = random.Random(2), 0, 0
    for _ in range(60):
        provider = small_provider(**drawn_pipeline(draw))
        try:
            provider.finalize()
        except ConfigError:
            refused += 1
            continue
        legal += 1
        stages = pipeline_stages(provider)
        assert [layer for one in stages for layer in one.layers] == [*range(provider.num_layers)]
        sizes = ParallelSizes.from_config(provider)
        assert sizes.vpp == virtual_stages(provider)
        for rank in range(sizes.pp):
            with fake_cluster(rank, sizes.pp, sizes):
                for chunk in [None] if sizes.vpp is None else range(sizes.vpp):
                    mine = stages[stage_index(provider, chunk, rank)].layers
                    assert mine.start == get_transformer_layer_offset(provider, chunk, rank)
    assert legal > 20
    assert refused > 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pipeline_model_parallel_layout": "Ettx|ttL"}, "Invalid layer character: x"),
        ({"pipeline_model_parallel_layout": "Ett|tt|tL"}, "=3.*pipeline_model_parallel_size=2"),
        (
            {"pipeline_model_parallel_layout": "Ett|ttL"},
            "with 4 layers t: expected num_layers = 5; the nearest legal: 'Ett|tttL'",
        ),
        ({"pipeline_model_parallel_layout": "Ett|tttmL"}, "with 1 layers m: .* mtp_num_layers = 0"),
        ({"pipeline_model_parallel_layout": "tt|tttL"}, "first layer must be embedding"),
        (
            {
                "pipeline_model_parallel_layout": "Et|t|tt|tL",
                "virtual_pipeline_model_parallel_size": 3,
                **INTERLEAVED,
            },
            "of 4 stages: expected 6, pipeline_model_parallel_size = 2 times virtual_.* = 3",
        ),
        ({"pipeline_model_parallel_layout": "Et|t|tt|tL"}, "interleaving needs .* overlap_p2p"),
        (
            {
                "pipeline_model_parallel_layout": [
                    ["embedding", "encoder"],
                    ["decoder"] * 5 + ["loss"],
                ]
            },
            "Encoder layer is not supported",
        ),
        (
            {
                "pipeline_model_parallel_layout": "Ett|tttL",
                "num_layers_in_first_pipeline_stage": 2,
            },
            "cannot be set with other",
        ),
        ({}, "num_layers=5 should be divisible"),
    ],
)
def test_a_pipeline_is_refused_without_ranks(fields: dict[str, Any], message: str) -> None:
    provider = small_provider(pipeline_model_parallel_size=2, **fields)
    with pytest.raises(ConfigError, match=message) as error:
        provider.finalize()
    assert str(error.value).count("\n") < 6


LEGAL = (
    ({"pipeline_model_parallel_size": 2}, "Ett|tttL"),
    ({"pipeline_model_parallel_size": 4}, "E|ttt|t|tL"),
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED}, "Et|t|t|t|t|||L"),
    ({"pipeline_model_parallel_size": 2, **INTERLEAVED}, "Et|tt|t|tL"),
)


def damaged(layout: str, draw: random.Random) -> str:
    """With one letter or stage less, more or elsewhere."""
    at = draw.randrange(len(layout))
    letter = draw.choice("EtmL|")
    return draw.choice(
        [
            layout[:at] + layout[at + 1 :],
            layout[:at] + letter + layout[at:],
            layout[:at] + letter + layout[at + 1 :],
        ]
    )


@pytest.mark.parametrize(("fields", "layout"), LEGAL)
def test_the_nearest_legal_layout_is_legal_and_near(fields: dict[str, Any], layout: str) -> None:
    small_provider(**fields, pipeline_model_parallel_layout=layout).finalize()
    draw = random.Random(layout)
    refused = 0
    for _ in range(40):
        given = damaged(layout, draw)
        message = refusal(fields | {"pipeline_model_parallel_layout": given})
        if message is None:
            continue
        refused += 1
        found = re.search("the nearest legal: '(.*?)'", message)
        assert found, message
        assert refusal(fields | {"pipeline_model_parallel_layout": found[1]}) is None
        same = SequenceMatcher(None, given, found[1]).get_matching_blocks()
        assert sum(block.size for block in same) >= len(given) - 4, message
    assert refused > 15


@pytest.mark.parametrize(
    ("given", "stages", "expected"),
    [
        ("Ett|ttmL", 2, "Ett|tttmL"),
        ("Ett|tttL", 2, "Ett|tttmL"),
        ("Ett|tt|m|L", 4, "Ett|ttt|m|L"),
        ("Ett|mtt|t|L", 4, "Ett|tt|t|mL"),
        ("Emtt|tttL", 2, "Ett|tttmL"),
    ],
)
def test_the_nearest_layout_that_predicts(given: str, stages: int, expected: str) -> None:
    found = nearest_layout(given, stages=stages, chunks=None, layers=5, predictors=1)
    assert found == expected


def refusal(fields: dict[str, Any]) -> str | None:
    try:
        small_provider(**fields).finalize()
    except ConfigError as error:
        return str(error)
    return None


def test_a_layout_of_other_letters_has_no_nearest() -> None:
    provider = small_provider(
        pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Eab|cdL"
    )
    with pytest.raises(ConfigError) as error:
        provider.finalize()
    assert "nearest" not in str(error.value)


def test_a_layout_is_read_anew_for_another_pipeline() -> None:
    """megatron-core keeps what it has parsed, and the chunks that follow from it."""
    provider = small_provider(
        pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|t|tt|tL", **INTERLEAVED
    )
    provider.finalize()
    assert provider.virtual_pipeline_model_parallel_size == 2
    provider.pipeline_model_parallel_size = 4
    provider.finalize()
    assert provider.virtual_pipeline_model_parallel_size is None
    assert provider.pipeline_model_parallel_layout.pipeline_model_parallel_size == 4
    assert [len(one.layers) for one in pipeline_stages(provider)] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("layout", "deepstack", "counts", "varies"),
    [
        ("Ettt|ttL", (0, 2), [0, 0, 0], False),
        ("Et|ttttL", (0, 2), [0, 1, 0], True),
        ("E|tt|tttL", (0, 1, 2), [0, 3, 1, 0], True),
        ("E|tttttL", (), [0, 0, 0], False),
    ],
)
def test_features_go_where_they_are_needed(
    layout: str, deepstack: tuple[int, ...], counts: list[int], varies: bool
) -> None:
    provider = small_provider(
        pipeline_model_parallel_size=layout.count("|") + 1,
        pipeline_model_parallel_layout=layout,
        vision=small_vision(deepstack_visual_indexes=deepstack),
    )
    provider.finalize()
    assert [one.deepstack for one in stage_boundaries(provider)] == counts
    assert provider.variable_seq_lengths is varies
    provider.pipeline_model_parallel_size, provider.pipeline_model_parallel_layout = 1, None
    provider.finalize()
    assert provider.variable_seq_lengths is False


@pytest.mark.parametrize(
    ("layout", "tied", "embeddings", "weights"),
    [
        ("Ettt|ttmL", False, [False, True, False], [0, 1]),
        ("Ettt|tt|mL", True, [False, True, True, False], [0, 2]),
        ("Ettt|ttm|L", False, [False, True, False, False], [0, 1]),
        ("Ettt|tt|m|L", True, [False, True, True, False, False], [0, 2, 3]),
    ],
)
def test_embeddings_go_to_the_predictors(
    layout: str, tied: bool, embeddings: list[bool], weights: list[int]
) -> None:
    provider = small_provider(
        "qwen3_5",
        mtp_num_layers=1,
        share_embeddings_and_output_weights=tied,
        pipeline_model_parallel_size=layout.count("|") + 1,
        pipeline_model_parallel_layout=layout,
    )
    provider.finalize()
    assert [one.embeddings for one in stage_boundaries(provider)] == embeddings
    assert embedding_stages(provider) == weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", ["Etttttm|L", "Ettt|ttmL", "Ettt|tt|m|L", "E|ttt||ttmL", "Et|t|t|t||tmL"]
)
def test_checkpoints_have_everything_once(layout: str, tied: bool) -> None:
    """Copies of the embedding are copies; nothing is hidden, nothing is saved twice."""
    chunks = 2 if layout.count("|") == 5 else 1
    stages = (layout.count("|") + 1) // chunks
    shapes: dict[str, tuple[int, ...]] = {}
    saved: dict[str, int] = {}
    for rank in range(stages):
        provider = small_provider(
            "qwen3_5",
            mtp_num_layers=1,
            share_embeddings_and_output_weights=tied,
            pipeline_model_parallel_size=stages,
            pipeline_model_parallel_layout=layout,
            **(INTERLEAVED if chunks > 1 else {}),
        )
        provider.finalize()
        sizes = ParallelSizes.from_config(provider)
        with fake_cluster(rank, stages, sizes), torch.device("meta"):
            for chunk in range(chunks) if chunks > 1 else [None]:
                state = provider.provide(vp_stage=chunk).sharded_state_dict()
                apply_factories(state)
                for entry in nested_values(state):
                    if isinstance(entry, ShardedTensor):
                        shapes[entry.key] = tuple(entry.global_shape)
                        saved.setdefault(entry.key, 0)
                        if set(entry.replica_id) == {0}:
                            saved[entry.key] += entry.data.numel()
    assert saved == {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    assert ("language_model.output_layer.weight" in saved) is not tied
    assert any(key.startswith("language_model.mtp.") for key in saved)
