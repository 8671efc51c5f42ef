"""Parallel layouts of the largest released models, drawn at random, and what ranks hold of them.

Nobody has the memory for such a model: its ranks are built on the meta device, one after the other,
on a fake process group. Of replicas the main one is built. On a rank, one layer of each kind is
built, and one expert of each layer; the others hold the same but for their numbers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from math import gcd
from typing import Any

import torch

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.exchange.roster import Shard
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.without_values import build_without_values
from megatron.bridge.operations.inspection.cluster_layout import (
    Blueprint,
    configured,
    on_rank,
    without_advice,
)
from megatron.bridge.operations.inspection.rank_grid import RankPosition, rank_positions
from megatron.bridge.operations.inspection.rank_shards import held_by
from megatron.bridge.runtime.parallel_sizes import ParallelSizes

MODELS = {
    "235B": released.QWEN3_VL_235B_A22B,
    "397B": released.QWEN3_5_397B_A17B,
    "2.4T": released.QWEN3_8_2400B_A95B,
}


@dataclass(frozen=True)
class DrawnLayout:
    """A layout of a released model.

    Attributes:
        model: one of MODELS.
        layers: of its decoder, the first ones; all of its widths are as released.
        sizes: of the cluster.
        fields: of the provider, beside the sizes.
    """

    model: str
    layers: int
    sizes: ParallelSizes
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.model} of {self.layers} layers, {self.sizes} {fields}"

    @property
    def bridge(self) -> AutoBridge:
        """Of the model."""
        return bridge_of(self.model, self.layers)

    @property
    def blueprint(self) -> Blueprint:
        """The model with these fields, without the sizes."""
        return Blueprint(self.bridge.model_bridge, partial(_provider, self))

    def provider(self) -> ModelProvider:
        """A new one that is not finalized."""
        provider = configured(self.blueprint, self.sizes)
        # `configured` chooses for training scripts.
        provider.set_fields(self.fields)
        return provider


def _provider(layout: DrawnLayout) -> ModelProvider:
    provider = copy.deepcopy(_whole_model(layout.model, layout.layers))
    provider.set_fields(layout.fields)
    return provider


@cache
def bridge_of(model: str, layers: int) -> AutoBridge:
    """Of a model with its first layers."""
    config = copy.deepcopy(MODELS[model])
    text = config.get("text_config", config)
    text["num_hidden_layers"] = layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    return AutoBridge.from_hf_config(config)


@cache
def _whole_model(model: str, layers: int) -> ModelProvider:
    return bridge_of(model, layers).to_megatron_provider(load_weights=False)


@lru_cache(4)  # plans of whole models are large
def _plan(
    model: str, layers: int, padded_vocab_size: int, without: frozenset[str]
) -> ConversionPlan:
    return bridge_of(model, layers).plan(PlanOptions(padded_vocab_size, without=without))


def plan_of(layout: DrawnLayout) -> ConversionPlan:
    """What fills the model."""
    provider = layout.provider()
    without = frozenset() if provider.mtp_num_layers else frozenset({"mtp"})
    return _plan(layout.model, layout.layers, provider.padded_vocab_size, without)


# --- what is drawn ---


def _divisors(number: int, most: int) -> list[int]:
    return [one for one in range(1, min(number, most) + 1) if number % one == 0]


def _text(model: str) -> dict[str, Any]:
    config = MODELS[model]
    found: dict[str, Any] = config.get("text_config", config)
    return found


def _tensor_parallel(model: str) -> list[int]:
    """Sizes that split every kind of head evenly, or give several ranks one key head."""
    text = _text(model)
    most = text["num_attention_heads"]
    for key in ("linear_num_key_heads", "linear_num_value_heads"):
        most = gcd(most, text.get(key, most))
    if "vision_config" in MODELS[model]:
        vision = MODELS[model]["vision_config"]
        most = gcd(gcd(most, vision["num_heads"]), vision["intermediate_size"])
    keys = text["num_key_value_heads"]
    return [one for one in _divisors(most, 16) if keys % one == 0 or one % keys == 0]


def _dealt(draw: random.Random, layers: int, rows: int) -> list[int]:
    """Numbers that sum up to the layers, the stages unlike each other."""
    cuts = sorted(draw.randint(0, layers) for _ in range(rows - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]


def _layout_string(draw: random.Random, layers: int, stages: int, chunks: int, mtp: bool) -> str:
    counts = _dealt(draw, layers, stages * chunks)
    rows = ["t" * count for count in counts]
    if mtp:
        # On the last chunk of a stage that is not the first, with no decoder layer behind it.
        last = max(row for row, count in enumerate(counts) if count)
        places = [row for row in range(len(rows)) if row >= last and row > len(rows) - stages]
        rows[draw.choice(places)] += "m"
    return f"E{'|'.join(rows)}L"


def _pipeline(draw: random.Random, layers: int, mtp: bool) -> tuple[int, int | None, dict]:
    """(stages, chunks, fields) of one of the ways to deal out layers."""
    while True:
        stages = draw.choice([1, 2, 2, 3, 4, 4, 5, 6, 8])
        kind = draw.choice(["even", "account", "uneven", "layout", "layout"])
        chunks = draw.choice([None, None, 2, 3, 4]) if stages > 1 else None
        if stages == 1:
            return 1, None, {}
        if kind == "layout":
            text = _layout_string(draw, layers, stages, chunks or 1, mtp)
            return stages, chunks, {"pipeline_model_parallel_layout": text}
        fields: dict[str, Any] = {}
        counted, between = layers, stages
        if kind == "account":
            fields["account_for_embedding_in_pipeline_split"] = draw.random() < 0.7
            fields["account_for_loss_in_pipeline_split"] = draw.random() < 0.7
            counted += sum(fields.values())
        if kind == "uneven":
            for end in draw.choice([("first",), ("last",), ("first", "last")]):
                count = draw.randint(1, layers // stages + 4)
                fields[f"num_layers_in_{end}_pipeline_stage"] = count
                if count % (chunks or 1):
                    break
                counted -= count
                between -= 1
            else:
                if (counted > 0) == (between > 0) and not (
                    between and (counted % between or counted // between % (chunks or 1))
                ):
                    return stages, chunks, fields
            continue
        if counted % between == 0 and counted // between % (chunks or 1) == 0:
            return stages, chunks, fields


def all_layers(model: str) -> int:
    """Of the decoder."""
    layers: int = _text(model)["num_hidden_layers"]
    return layers


def draw_legal(draw: random.Random, model: str, layers: int, most_ranks: int = 32) -> DrawnLayout:
    """A legal layout.

    Args:
        draw: what is drawn from.
        model: one of MODELS.
        layers: of its decoder.
        most_ranks: that have to be built.
    """
    text = _text(model)
    while True:
        mtp = "mtp_num_hidden_layers" in text and draw.random() < 0.6
        cp = 1 if mtp else draw.choice([1, 1, 2, 4])
        tp = draw.choice(_tensor_parallel(model))
        heads = text.get("linear_num_key_heads", 0)
        if heads % (tp * cp):
            continue
        ep = draw.choice(_divisors(text["num_experts"], 64))
        etp = draw.choice([None, 1, 1, *_divisors(text["moe_intermediate_size"], 8)])
        pp, vpp, fields = _pipeline(draw, layers, mtp)
        if pp * max(tp, ep * (etp or tp)) > most_ranks:
            continue
        sizes = ParallelSizes(tp, pp, vpp, cp, ep, etp)
        if draw.random() < 0.4:
            sizes = replace(sizes, world_size=sizes.ranks * draw.choice([2, 3]))
        if sizes.ranks > 8 * most_ranks:
            continue
        fields |= {"mtp_num_layers": 1 if mtp else None}
        # Experts that are split beside tensor parallelism need it.
        fields["sequence_parallel"] = tp > 1 and (ep > 1 or draw.random() < 0.5)
        fields["make_vocab_size_divisible_by"] = draw.choice([128, 128, 1, 96])
        if vpp is not None:
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        return DrawnLayout(model, layers, sizes, fields)


# --- what ranks hold ---


def main_positions(sizes: ParallelSizes) -> list[RankPosition]:
    """The ranks that hold a main replica, of the dense part or of experts."""
    return [one for one in rank_positions(sizes) if (one.dp == 0 and one.cp == 0) or one.edp == 0]


def build(layout: DrawnLayout) -> list[torch.nn.Module]:
    """The chunks of this rank."""
    provider = layout.provider()
    chunks = [None] if layout.sizes.vpp is None else range(layout.sizes.vpp)
    return build_without_values(
        provider, lambda: [provider.provide(vp_stage=chunk) for chunk in chunks]
    )


def main_shards(layout: DrawnLayout) -> Iterator[Shard]:
    """What all ranks hold the main replicas of."""
    with without_advice():
        with on_rank(0, layout.sizes):
            positions = main_positions(layout.sizes)
        for position in positions:
            with on_rank(position.rank, layout.sizes):
                yield from (Shard.of(one) for one in held(layout) if one.is_main)


def held(layout: DrawnLayout) -> Iterator[LocalTensor]:
    """What this rank holds; layers that are alike are built once."""
    return held_by(layout.provider(), layout.sizes.vpp)
