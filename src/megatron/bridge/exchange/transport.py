"""Bytes between ranks: what each of them has for each of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.runtime.lost_ranks import wait_for
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.text.quoting import quoted

type TransportName = Literal["all-to-all", "point-to-point"]

type Wait = Callable[[], None]
"""Returns when what was begun is done."""


class Transport(ABC):
    """How bytes go from rank to rank.

    Args:
        group: of the ranks, None for all of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @abstractmethod
    def start(
        self,
        send: torch.Tensor,
        send_sizes: Sequence[int],
        receive: torch.Tensor,
        receive_sizes: Sequence[int],
    ) -> Wait:
        """Begin to exchange; every rank calls this.

        Args:
            send: uint8 [sum of send_sizes], for each rank in turn. It stays as it is until the
                exchange is done.
            send_sizes: bytes for each rank.
            receive: uint8 [sum of receive_sizes], of each rank in turn.
            receive_sizes: bytes of each rank.

        Returns:
            What waits until `receive` is filled.
        """

    def _waiting(self, works: Sequence[dist.Work | None]) -> Wait:
        def wait() -> None:
            for work in works:
                wait_for(work, self.group)

        return wait


class AllToAll(Transport):
    """One collective for all bytes."""

    def start(
        self,
        send: torch.Tensor,
        send_sizes: Sequence[int],
        receive: torch.Tensor,
        receive_sizes: Sequence[int],
    ) -> Wait:
        """As of Transport."""
        work = dist.all_to_all_single(
            receive, send, list(receive_sizes), list(send_sizes), group=self.group, async_op=True
        )
        return self._waiting([work])


class PointToPoint(Transport):
    """A message for each pair of ranks that has bytes; the others do not meet."""

    def start(
        self,
        send: torch.Tensor,
        send_sizes: Sequence[int],
        receive: torch.Tensor,
        receive_sizes: Sequence[int],
    ) -> Wait:
        """As of Transport."""
        messages = [
            dist.P2POp(operation, part, group=self.group, group_peer=peer)
            for operation, buffer, sizes in (
                (dist.irecv, receive, receive_sizes),
                (dist.isend, send, send_sizes),
            )
            for peer, part in enumerate(_parts(buffer, sizes))
            if len(part)
        ]
        return self._waiting(dist.batch_isend_irecv(messages) if messages else [])


class Alone(Transport):
    """One process, which has nobody to send to."""

    def start(
        self,
        send: torch.Tensor,
        send_sizes: Sequence[int],
        receive: torch.Tensor,
        receive_sizes: Sequence[int],
    ) -> Wait:
        """As of Transport."""
        if any(send_sizes) or any(receive_sizes):
            raise InputError("one process has nobody to exchange with")
        return self._waiting([])


_BY_NAME: dict[str, type[Transport]] = {"all-to-all": AllToAll, "point-to-point": PointToPoint}


def transport_between(ranks: Ranks, name: TransportName = "all-to-all") -> Transport:
    """A way between some ranks.

    Args:
        ranks: between which bytes go.
        name: of the way.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _BY_NAME:
        expected = " or ".join(map(repr, _BY_NAME))
        raise InputError(f"transport is {quoted(name)}; expected {expected}")
    return _BY_NAME[name](ranks.group) if ranks.are_joined else Alone()


def _parts(buffer: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    ends = list(accumulate(sizes))
    return [buffer[end - size : end] for end, size in zip(ends, sizes, strict=True)]
