"""Boxes of the plan against megatron-core's own sharded_state_dict, on clusters that do not exist.

The real model classes are built on the meta device for every rank of a fake process group; all
ranks together must hold exactly the tensors, shapes and boxes of the plan.
"""

import random
from collections import defaultdict
from typing import Any

import pytest
import torch

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.boxes import Box, intersect, tiling_faults

CONFIGS = {"2B": released.QWEN3_VL_2B, "32B": released.QWEN3_VL_32B}


def layouts(name: str) -> list[tuple[int, int]]:
    """(TP, PP) of a few clusters, drawn at random but always the same, and the one of one rank."""
    choice = random.Random(name)
    possible = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) if tp * pp > 1]
    return [(1, 1), *choice.sample(possible, 2)]


def held_by_all_ranks(
    bridge: AutoBridge, tp: int, pp: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, set[Box]], set[str], int]:
    """Global shapes, boxes and object names that megatron-core declares over all ranks."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron.bridge.checkpoint.live_model import local_tensors
    from megatron.bridge.runtime.parallel import ParallelSizes, fake_cluster

    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = tp
    provider.pipeline_model_parallel_size = pp
    provider.pipeline_dtype = torch.bfloat16
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, set[Box]] = defaultdict(set)
    objects: set[str] = set()
    for rank in range(tp * pp):
        with fake_cluster(rank, tp * pp, ParallelSizes.from_config(provider)), torch.device("meta"):
            model = provider.provide()
            for local in local_tensors([model]):
                assert shapes.setdefault(local.key, local.key_shape) == local.key_shape
                boxes[local.key].add(local.box)
            objects |= {
                entry.unique_key
                for entry in nested_values(model.sharded_state_dict())
                if isinstance(entry, ShardedObject)
            }
    return shapes, boxes, objects, provider.padded_vocab_size


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [(name, tp, pp) for name in CONFIGS for tp, pp in layouts(name)]
)
def test_the_plan_is_what_megatron_core_declares(name: str, tp: int, pp: int) -> None:
    config: dict[str, Any] = CONFIGS[name] | {"dtype": "bfloat16"}
    bridge = AutoBridge.from_hf_config(config)
    shapes, boxes, objects, padded_vocab_size = held_by_all_ranks(bridge, tp, pp)
    plan = bridge.plan(padded_vocab_size)

    assert {key: spec.shape for key, spec in plan.megatron.items()} == shapes
    assert set(plan.extra_states) == objects
    for key, shape in shapes.items():
        assert list(tiling_faults(shape, boxes[key])) == [], key
    for parameter in plan.parameters:
        # Every rank's box lies inside of one parameter or outside of it, never across its border.
        shared = {intersect(box, parameter.box) for box in boxes[parameter.key]} - {None}
        assert shared <= boxes[parameter.key], parameter.name
        if tp == pp == 1:
            parts = 2 if parameter.name.endswith("mlp.linear_fc1.weight") else 1
            is_vision = parameter.name.startswith("vision_model")
            assert len(shared) == (1 if is_vision else parts), parameter.name
