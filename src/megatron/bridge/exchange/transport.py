"""Bytes between ranks: what each of them has for each of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError
from megatron.bridge.runtime.lost_ranks import wait_for
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.text.quoting import quoted

type TransportName = Literal["all-to-all", "point-to-point"]

type Wait = Callable[[], None]
"""Returns when what was begun is done."""


class Message(NamedTuple):
    """Bytes between this rank and another.

    Attributes:
        peer: the other one.
        memory: uint8, contiguous.
    """

    peer: int
    memory: torch.Tensor


class Traffic(NamedTuple):
    """What goes to the other ranks, or comes from them.

    Attributes:
        buffer: uint8 [sum of sizes], for each rank in turn.
        sizes: bytes for each rank.
        messages: the same bytes, those of a pair of ranks in an order and of sizes that are the
            same at both ends. They may be in other memory than the buffer's.
    """

    buffer: torch.Tensor
    sizes: Sequence[int]
    messages: Sequence[Message]

    @classmethod
    def in_buffer(cls, buffer: torch.Tensor, sizes: Sequence[int]) -> Self:
        """All of it in the buffer."""
        ends = zip(accumulate(sizes), sizes, strict=True)
        parts = [buffer[end - size : end] for end, size in ends]
        return cls(buffer, sizes, [Message(*one) for one in enumerate(parts) if len(one[1])])


class Transport(ABC):
    """How bytes go from rank to rank.

    Args:
        group: of the ranks, None for all of them.

    Attributes:
        takes_messages: wherever their memory is; else all bytes have to be in the buffers.
        collectives: that `start` is.
    """

    takes_messages: ClassVar[bool] = False
    collectives: ClassVar[int] = 0

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @abstractmethod
    def start(self, send: Traffic, receive: Traffic) -> Wait:
        """Begin to exchange; every rank calls this.

        Args:
            send: for the other ranks. It stays as it is until the exchange is done.
            receive: memory for what comes from them.

        Returns:
            What waits until all has arrived.
        """

    def _waiting(self, works: Sequence[dist.Work | None]) -> Wait:
        def wait() -> None:
            for work in works:
                wait_for(work, self.group)

        return wait


class AllToAll(Transport):
    """One collective for all bytes."""

    collectives = 1

    def start(self, send: Traffic, receive: Traffic) -> Wait:
        """As of Transport."""
        work = dist.all_to_all_single(
            receive.buffer,
            send.buffer,
            list(receive.sizes),
            list(send.sizes),
            group=self.group,
            async_op=True,
        )
        return self._waiting([work])


class PointToPoint(Transport):
    """Messages for each pair of ranks that has bytes; the others do not meet."""

    takes_messages = True

    def start(self, send: Traffic, receive: Traffic) -> Wait:
        """As of Transport."""
        messages = [
            dist.P2POp(operation, memory, group=self.group, group_peer=peer)
            for operation, side in ((dist.irecv, receive), (dist.isend, send))
            for peer, memory in side.messages
        ]
        return self._waiting(dist.batch_isend_irecv(messages) if messages else [])


class Alone(Transport):
    """One process, which has nobody to send to."""

    def start(self, send: Traffic, receive: Traffic) -> Wait:
        """As of Transport."""
        if any(send.sizes) or any(receive.sizes):
            raise InputError("one process has nobody to exchange with")
        return self._waiting([])


_BY_NAME: dict[str, type[Transport]] = {"all-to-all": AllToAll, "point-to-point": PointToPoint}


def transport_between(ranks: Ranks, name: TransportName = "point-to-point") -> Transport:
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
