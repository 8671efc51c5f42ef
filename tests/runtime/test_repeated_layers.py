"""Layers of the same kind that are built once: the parameters are those of the whole model."""

from typing import Any

import pytest
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron.bridge.live.local_tensors import named_parameters
from megatron.bridge.operations.inspection.cluster_layout import on_rank
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.runtime.repeated_layers import RepeatedLayer, repeated_layers
from providers import small_provider


def parameters(model: Any) -> list[tuple[Any, ...]]:
    return [
        (name, parameter.shape, parameter.dtype, parameter.requires_grad, vars(parameter))
        for name, _, parameter in named_parameters([model])
    ]


@pytest.mark.parametrize(("family", "kinds"), [("qwen3_vl", 1), ("qwen3_5_moe", 2)])
def test_the_second_stage_of_two(family: str, kinds: int) -> None:
    sizes = ParallelSizes(pp=2)
    fields: dict[str, Any] = sizes.fields | {"num_layers": 12, "freeze_language_model": True}
    with on_rank(1, sizes):
        whole = small_provider(family, **fields).provide()
        with repeated_layers():
            short = small_provider(family, **fields).provide()
        again = small_provider(family, **fields).provide()
    assert parameters(short) == parameters(whole)
    assert len({id(parameter) for parameter in short.parameters()}) == len(parameters(whole))
    layers = short.language_model.decoder.layers
    assert [layer.layer_number for layer in layers] == [7, 8, 9, 10, 11, 12]
    assert sum(isinstance(layer, RepeatedLayer) for layer in layers) == len(layers) - kinds
    assert all(isinstance(layer, TransformerLayer) for layer in again.language_model.decoder.layers)
