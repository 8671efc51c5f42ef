"""Which parts of checkpoint tensors the ranks of a cluster hold, without a cluster.

Every rank is built on the meta device, one after the other, as a rank of torch's fake process
group; of replicas one. Of a rank, one layer of each kind is built, and one expert of a layer: the
others hold the same but for their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron.bridge.exchange.roster import Shard
from megatron.bridge.live.local_tensors import LocalTensor, local_tensors
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.without_values import build_without_values
from megatron.bridge.operations.inspection.cluster_layout import (
    Blueprint,
    configured,
    on_rank,
    without_advice,
)
from megatron.bridge.operations.inspection.rank_grid import rank_positions
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from megatron.bridge.runtime.repeated_layers import repeated_experts, repeated_layers


def shards_of_ranks(
    model: Blueprint, sizes: ParallelSizes, progress: Progress | None = None
) -> list[tuple[Shard, ...]]:
    """What each rank of a cluster holds, in the order of the ranks. Replicas share one tuple.

    Args:
        model: the one that is laid out.
        sizes: of the cluster, which the model has to be legal with.
        progress: told of the ranks that are built.
    """
    shown = progress or Silent()
    with without_advice():
        with on_rank(0, sizes):
            positions = rank_positions(sizes)
        places = {one.rank: (one.pp, one.tp, one.ep, one.etp) for one in positions}
        first = {place: rank for rank, place in reversed(places.items())}
        shown.start("plan", len(first))
        held = {}
        for place, rank in first.items():
            with on_rank(rank, sizes):
                held[place] = tuple(map(Shard.of, held_by(configured(model, sizes), sizes.vpp)))
            shown.advance(1)
    return [held[place] for place in places.values()]


def held_by(provider: ModelProvider, chunks: int | None) -> Iterator[LocalTensor]:
    """What the current rank of an imagined cluster holds.

    Args:
        provider: of the model, with the sizes of the cluster.
        chunks: of a pipeline stage; None for one.
    """
    stages = [None] if chunks is None else list(range(chunks))
    with repeated_experts(), repeated_layers():
        model = build_without_values(
            provider, lambda: [provider.provide(vp_stage=stage) for stage in stages]
        )
    built = local_tensors(model)
    yield from built
    for path, template, others in _alike(model):
        for one in built:
            yield from _repeated(one, path, template, others)


def _repeated(
    built: LocalTensor, path: str, template: int, others: Sequence[int]
) -> Iterable[LocalTensor]:
    """What other layers hold in the place of a tensor of the layer that was built."""
    if not built.key.startswith(path):
        return ()
    number, _, rest = built.key.removeprefix(path).partition(".")
    if number == str(template):
        return (replace(built, key=f"{path}{other}.{rest}") for other in others)
    if not number.isdecimal() and built.box[0] == (template, template + 1):
        # Layers that are all alike are an axis.
        return (replace(built, box=((other, other + 1), *built.box[1:])) for other in others)
    return ()


def _alike(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, int, list[int]]]:
    """(path of the layers, number of the one that was built, numbers of those like it)."""
    for chunk in chunks:
        for name, block in chunk.named_modules():
            if not isinstance(block, TransformerBlock):
                continue
            alike: dict[int, list[int]] = defaultdict(list)  # by the memory that they share
            for layer in block.layers:
                memory = next(layer.parameters()).untyped_storage()._cdata
                alike[memory].append(layer.layer_number - 1)
            for template, *others in alike.values():
                yield f"{name}.layers.", template, others
