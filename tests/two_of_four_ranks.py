"""Two ranks of four that have a model, and what is asked of them and of the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.bridge import AutoBridge
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.tensors.boxes import full_box, slices
from refit_targets import Files

WINDOW = 250_000
"""Bytes: less than the largest tensors have."""


def uneven_targets(files: Files, names: list[str], place: int) -> list[Landing]:
    """What the first or the second of two ranks wants: two sevenths of the last axis, or more.

    The second also wants what lies at the middle, so that some of it goes to both.
    """
    found = []
    for number, name in enumerate(names):
        shape = tuple(files[name].shape)
        box = list(full_box(shape))
        if shape and shape[-1] > 6:
            size = shape[-1]
            box[-1] = (0, size * 2 // 7 + 1) if place == 0 else (size * 2 // 7 - 1, size)
        out = torch.zeros_like(files[name][slices(tuple(box))])
        if number % 2 and out.dim() > 1:
            out = torch.zeros_like(out.mT.contiguous()).mT
        found.append(Landing(name, tuple(box), out))
    return found


@contextmanager
def on_two_ranks(bridge: AutoBridge, first: int, fields: dict[str, Any]) -> Iterator[list[Any]]:
    """The chunks of this rank; none on the two ranks that are not the trainer's."""
    from megatron.core import parallel_state

    provider = bridge.to_megatron_provider()
    provider.set_fields(fields)
    provider.initialize_model_parallel(rank_offset=first, local_world_size=2)
    is_trainer = first <= dist.get_rank() < first + 2
    yield provider.provide_distributed_model(wrap_with_ddp=False) if is_trainer else []
    parallel_state.destroy_model_parallel()


def told_by(first: int, bridge: AutoBridge, model: list[Any]) -> dict[str, torch.Tensor]:
    """What the model is exported as: among the trainer's ranks alone, who tell the others."""
    told = [dict(bridge.export_hf_weights(model)) if model else None]
    dist.broadcast_object_list(told, first)
    return told[0] or {}


def unusual(model: list[Any]) -> None:
    """Values that are equal and have other bits, and those that are not equal to themselves."""
    for chunk in model:
        for parameter in chunk.parameters():
            values = parameter.data.view(-1)
            values[:2], values[2:4], values[4:6] = 0.0, float("nan"), float("inf")
            values[1] *= -1


def moved(model: list[Any]) -> None:
    """The first parameter of one rank is in other memory."""
    if model and dist.get_rank() % 2:
        parameter = next(model[0].parameters())
        parameter.data = parameter.data.clone()
