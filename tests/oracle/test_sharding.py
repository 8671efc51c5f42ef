"""Boxes of the plan against megatron-core's own sharded_state_dict, on clusters that do not exist.

The real model classes are built on the meta device for ranks of a fake process group. Where every
rank is built, all together must hold exactly the tensors, shapes and boxes of the plan; of the
largest models some ranks are built, and each must hold boxes of the plan and nothing else.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import pytest
import torch

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box, BoxIndex, tiling_faults


@dataclass(frozen=True)
class Layout:
    """Sizes of a cluster; `etp` is the tensor-parallel size of experts."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world_size(self) -> int:
        return lcm(self.tp * self.pp, self.ep * self.etp * self.pp)

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}ep{self.ep}etp{self.etp}"


ONE_RANK = Layout()


def drawn(name: str, config: dict[str, Any], count: int) -> list[Layout]:
    """Clusters that fit a model, drawn at random but always the same."""
    text = config["text_config"]
    experts, kv_heads = text.get("num_experts", 1), text["num_key_value_heads"]
    possible = [
        Layout(tp, pp, ep, etp)
        for tp in (1, 2, 4, 8)
        for pp in (1, 2, 4)
        for ep in ((1,) if experts == 1 else (1, 2, 4))
        for etp in ((tp,) if experts == 1 else (1, 2, 4))
        if tp * pp * ep * etp > 1
        and max(tp, kv_heads) % min(tp, kv_heads) == 0
        and text["num_hidden_layers"] % pp == 0
        and lcm(tp * pp, ep * etp * pp) <= 8
    ]
    return random.Random(name).sample(possible, count)


@dataclass
class Held:
    """What megatron-core declares on some ranks: shapes, boxes, names of objects."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    boxes: dict[str, set[Box]] = field(default_factory=lambda: defaultdict(set))
    objects: set[str] = field(default_factory=set)
    padded_vocab_size: int = 0


def parts_without(with_mtp: bool) -> frozenset[str]:
    return frozenset() if with_mtp else frozenset({"mtp"})


def held_by(bridge: AutoBridge, layout: Layout, ranks: Iterable[int], *, with_mtp: bool) -> Held:
    from megatron.bridge.live.local_tensors import local_tensors
    from megatron.bridge.runtime.parallel import fake_cluster
    from megatron.bridge.runtime.parallel_sizes import ParallelSizes
    from oracle.norm_states import objects_with_norms

    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = layout.tp
    provider.pipeline_model_parallel_size = layout.pp
    provider.pipeline_dtype = torch.bfloat16
    provider.transformer_impl = "local"  # TransformerEngine's modules are never on the meta device
    provider.perform_initialization = False  # there are no values
    if provider.num_moe_experts:
        provider.expert_model_parallel_size = layout.ep
        provider.expert_tensor_parallel_size = layout.etp
        # megatron-core asks for it where experts meet tensor parallelism.
        provider.sequence_parallel = layout.tp > 1
    if with_mtp:
        provider.mtp_num_layers = 1
    held = Held(padded_vocab_size=provider.padded_vocab_size)
    sizes = ParallelSizes.from_config(provider)
    for rank in ranks:
        with fake_cluster(rank, layout.world_size, sizes), torch.device("meta"):
            model = provider.provide()
            for local in local_tensors([model]):
                assert held.shapes.setdefault(local.key, local.key_shape) == local.key_shape
                held.boxes[local.key].add(local.box)
            held.objects |= objects_with_norms(model)
    return held


def assert_whole(plan: ConversionPlan, held: Held) -> None:
    """All ranks together hold what is planned."""
    assert {key: spec.shape for key, spec in plan.megatron.items()} == held.shapes
    assert set(plan.extra_states) == held.objects
    for key, shape in held.shapes.items():
        assert list(tiling_faults(shape, held.boxes[key])) == [], key
    assert_within_parameters(plan, held)


def assert_within_parameters(plan: ConversionPlan, held: Held) -> None:
    """Every rank's box lies inside of one parameter or outside of it, never across its border."""
    parameters: dict[str, list[tuple[Box, None]]] = defaultdict(list)
    for parameter in plan.parameters:
        parameters[parameter.key].append((parameter.box, None))
    for key, boxes in held.boxes.items():
        index = BoxIndex(parameters[key])
        for box in boxes:
            assert [shared for shared, _ in index.overlapping(box)] == [box], (key, box)


def cut(config: dict[str, Any], layers: int, experts: int) -> dict[str, Any]:
    """A released config with fewer layers, and fewer experts."""
    config = copy.deepcopy(config)
    config["text_config"] |= {"num_hidden_layers": layers, "num_experts": experts}
    if "layer_types" in config["text_config"]:
        del config["text_config"]["layer_types"][layers:]
    return config


WHOLE: dict[str, dict[str, Any]] = {
    "VL-2B": released.QWEN3_VL_2B,
    "VL-32B": released.QWEN3_VL_32B,
    "VL-30B-A3B, 4 layers, 24 experts": cut(released.QWEN3_VL_30B_A3B, 4, 24),
    "3.5-2B": released.QWEN3_5_2B,
    "3.5-35B-A3B, 6 layers, 32 experts": cut(released.QWEN3_5_35B_A3B, 6, 32),
}
WHOLE_CASES = [
    (name, layout)
    for name, config in WHOLE.items()
    for layout in (ONE_RANK, *drawn(name, config, 2 if "3B" in name else 1))  # 3B: with experts
]


@pytest.mark.parametrize(("name", "layout"), WHOLE_CASES, ids=str)
def test_all_ranks_hold_what_is_planned(name: str, layout: Layout) -> None:
    bridge = AutoBridge.from_hf_config(WHOLE[name] | {"dtype": "bfloat16"})
    # megatron-core has no tied output layer beside an MTP layer on a later pipeline stage.
    with_mtp = "mtp_num_hidden_layers" in WHOLE[name]["text_config"] and not (
        WHOLE[name]["tie_word_embeddings"] and layout.pp > 1
    )
    held = held_by(bridge, layout, range(layout.world_size), with_mtp=with_mtp)
    plan = bridge.plan(PlanOptions(held.padded_vocab_size, without=parts_without(with_mtp)))
    assert_whole(plan, held)


SAMPLED = {
    "VL-235B-A22B": (released.QWEN3_VL_235B_A22B, Layout(4, 2, 8, 1)),
    "3.5-122B-A10B": (released.QWEN3_5_122B_A10B, Layout(2, 4, 8, 2)),
    "3.5-397B-A17B": (released.QWEN3_5_397B_A17B, Layout(4, 4, 32, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_ranks_of_large_clusters_hold_what_is_planned(name: str) -> None:
    config, layout = SAMPLED[name]
    bridge = AutoBridge.from_hf_config(config | {"dtype": "bfloat16"})
    last = layout.world_size - 1
    ranks = [0, *random.Random(name).sample(range(1, last), 3), last]
    with_mtp = "mtp_num_hidden_layers" in config["text_config"]
    held = held_by(bridge, layout, ranks, with_mtp=with_mtp)
    plan = bridge.plan(PlanOptions(held.padded_vocab_size, without=parts_without(with_mtp)))
    planned = {key: spec.shape for key, spec in plan.megatron.items()}
    assert held.shapes.items() <= planned.items()
    assert held.objects <= set(plan.extra_states)
    assert_within_parameters(plan, held)
    assert any(".mtp." in key for key in held.shapes) == with_mtp
    assert any(".embedding." in key for key in held.shapes)
