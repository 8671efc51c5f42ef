"""Seeded changes of a small model folder: as people bring them, and as they break."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

import broken_folders as broken
import whole_folders as whole
from folders_in_memory import ALL, DENSE_3_5, MOE, QWEN3_5, Folder

type Change = Callable[[Folder, Random], None]

WHOLE: Mapping[Change, frozenset[str]] = {
    whole.extra_tensors: ALL,
    whole.buffers: ALL,
    whole.value_head_inside: ALL,
    whole.value_head_beside: ALL,
    whole.adapter_beside: ALL,
    whole.consolidated_beside: ALL,
    whole.side_files: ALL,
    whole.tied_with_a_copy: ALL,
    whole.tied_under_the_other_name: ALL,
    whole.names_of_the_bare_model: ALL,
    whole.bare_model: ALL,
    whole.classifier: DENSE_3_5,
    whole.other_shard_names: ALL,
    whole.stale_metadata: ALL,
    whole.index_with_one_file: ALL,
    whole.index_of_other_names: ALL,
    whole.stale_index: ALL,
    whole.in_two_shards: ALL,
    whole.layers_beyond: ALL,
    whole.biases: ALL,
    whole.another_copy: ALL,
    whole.other_mtp: QWEN3_5,
    whole.half_prefixed: ALL,
    whole.a_copy_under_another_root: ALL,
    whole.tracker_of_a_trainer: ALL,
    whole.shards_in_folders: ALL,
    whole.experts_passed_over: MOE,
    whole.experts_one_by_one: MOE & QWEN3_5,
}
"""Changes after which transformers fills every weight, and the families they can happen to."""

OF_OTHER_PARTS: Mapping[Change, frozenset[str]] = {
    whole.dtype_of_one_tensor: ALL,
    whole.left_out_keys: ALL,
}
"""More of them, which need more than names: dtypes of single tensors, defaults of the config."""

BROKEN: Mapping[Change, frozenset[str]] = {
    broken.deleted_tensor: ALL,
    broken.renamed_tensor: ALL,
    broken.renamed_everywhere: ALL,
    broken.reshaped_tensor: ALL,
    broken.transposed_tensor: ALL,
    broken.truncated_shard: ALL,
    broken.missing_shard: ALL,
    broken.empty_shard: ALL,
    broken.page_in_place_of_a_shard: ALL,
    broken.other_count: ALL,
    broken.other_size: ALL,
    broken.other_size_of_vision: ALL,
    broken.without_a_part: ALL,
    broken.without_layers: ALL,
    broken.without_a_head: ALL,
    broken.classifier_without_its_head: DENSE_3_5,
    broken.wrapped_layers: ALL,
    broken.adapters_not_merged: ALL,
    broken.names_of_another_program: ALL,
    broken.text_half: ALL,
    broken.another_root_of_a_layer: ALL,
    broken.expert_of_another_layout: MOE & QWEN3_5,
    broken.shard_without_an_entry: ALL,
}
"""Changes after which it does not."""


def draw(seed: int, changes: Mapping[Change, frozenset[str]], family: str) -> Change:
    """The change number `seed` for a family: each in its turn."""
    fitting = [change for change, families in changes.items() if family in families]
    return fitting[seed % len(fitting)]
