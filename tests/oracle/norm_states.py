"""The states that TransformerEngine's norms save, without TransformerEngine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron.bridge.models.backends.torch_norm import LayerNorm, RMSNorm
from megatron.bridge.runtime.cpu import megatron_on_cpu


def is_of_fused_norm(entry: object) -> bool:
    """What megatron-core calls the state of a norm that TransformerEngine fuses into a linear."""
    return isinstance(entry, ShardedObject) and "layer_norm__extra_state" in entry.unique_key


@contextmanager
def norms_that_save_a_state() -> Iterator[None]:
    """Norms of the torch backend save an empty state, as TransformerEngine's do."""
    empty = {"get_extra_state": lambda norm: None, "set_extra_state": lambda norm, state: None}
    with (
        patch.multiple(RMSNorm, create=True, **empty),
        patch.multiple(LayerNorm, create=True, **empty),
    ):
        yield


def state_with_norms(model: Any) -> Any:
    """The sharded state dict that `model` would have on TransformerEngine's norms."""
    with norms_that_save_a_state(), megatron_on_cpu():
        state = model.sharded_state_dict()
    return extract_matching_values(state, is_of_fused_norm)[1]


def objects_with_norms(model: Any) -> set[str]:
    """Names of the objects in `state_with_norms`."""
    return {
        entry.unique_key
        for entry in nested_values(state_with_norms(model))
        if isinstance(entry, ShardedObject)
    }
