"""What tests of refits do with models, and look at in memory that was filled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron.bridge.errors import BridgeError
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.tensors.boxes import slices

SECONDS = 10
"""A refusal that takes longer waited for something."""

type Files = Mapping[str, torch.Tensor]


def is_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit."""
    one, other = (tensor.contiguous().view(torch.uint8) for tensor in (found, expected))
    return torch.equal(one, other)


def wrong(targets: Sequence[Landing], files: Files) -> list[str]:
    """Names of targets with other bits than the tensors have."""
    return [one.name for one in targets if not is_equal(one.out, files[one.name][slices(one.box)])]


def changed(model: Any, part: float, seed: int) -> None:
    """Change some of the values of every parameter; they are among the largest then."""
    draw = torch.Generator().manual_seed(seed)
    for chunk in model:
        for parameter in chunk.parameters():
            values = parameter.data.view(-1)
            places = torch.randperm(len(values), generator=draw)[: round(len(values) * part)]
            values[places] = values[places] * 2 + 1


def refused(call: Callable[[], object]) -> str:
    """What it says and, if that is long, how long it took."""
    begin = time.monotonic()
    try:
        call()
    except BridgeError as error:
        seconds = time.monotonic() - begin
        return str(error) if seconds < SECONDS else f"after {seconds:.0f} s: {error}"
    return "nothing was refused"
