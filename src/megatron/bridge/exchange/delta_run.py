"""Running an exchange again: of each window only what changed since the last time is sent.

The sender packs what it has now and what it had then, and compares. The receiver packs what it
wants as it has it, makes the new buffer of that, and unpacks it. Nobody keeps what was sent: the
sender keeps what it held, and the receiver's memory is the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron.bridge.exchange.buffer_views import Destination, PackedWindow, Packing, Side
from megatron.bridge.exchange.delta import apply, encoded
from megatron.bridge.exchange.transport import Traffic, Transport
from megatron.bridge.exchange.window_run import Exchange
from megatron.bridge.runtime.lost_ranks import naming_lost
from megatron.bridge.runtime.ranks import Ranks


class _Window(NamedTuple):
    now: PackedWindow
    before: PackedWindow


class DeltaRun:
    """The changes of all windows.

    Args:
        exchange: of all ranks.
        ranks: all of them make one, and do all that follows together.
        transport: moves the bytes.
        packings: of what this rank holds now, and of what it held then.
        destination: of what it wants.
        device: where buffers are.

    Attributes:
        sent_bytes: of the last run, to other ranks.
        received_bytes: likewise.
        message_bytes: the most memory that messages of a window took.
    """

    def __init__(
        self,
        exchange: Exchange,
        ranks: Ranks,
        transport: Transport,
        packings: tuple[Packing, Packing],
        destination: Destination,
        device: torch.device,
    ) -> None:
        self._ranks, self._transport, self._device = ranks, transport, device
        self._windows = [
            _Window(
                *(
                    exchange.packed(number, packing, destination, buffer=buffer)
                    for buffer, packing in enumerate(packings)
                )
            )
            for number in range(exchange.count)
        ]
        self.sent_bytes = self.received_bytes = self.message_bytes = 0

    def run(self) -> bool:
        """Send and receive what changed; every rank does this.

        Returns:
            Whether everything has arrived. It has not on a rank where somebody changed what was
            received last.

        Raises:
            InputError: another rank cannot go on, or is gone.
            InexactCast: values do not fit the dtype that they are to have.
        """
        self.sent_bytes = self.received_bytes = self.message_bytes = 0
        arrived = True
        for window in self._windows:
            arrived &= self._exchanged(window)
        return arrived

    def _exchanged(self, window: _Window) -> bool:
        def packed() -> tuple[list[torch.Tensor], list[int]]:
            messages = self._messages(window)
            return messages, [message.numel() for message in messages]

        messages, received_sizes = self._ranks.agreed_with_each(packed, self._device)
        sizes = [message.numel() for message in messages]
        with naming_lost(self._ranks.group):
            send = torch.cat([*messages, self._empty(0)])
            receive = self._empty(sum(received_sizes))
            self._transport.start(
                Traffic.in_buffer(send, sizes), Traffic.in_buffer(receive, received_sizes)
            )()
        self.sent_bytes += send.numel()
        self.received_bytes += receive.numel()
        self.message_bytes = max(self.message_bytes, 2 * send.numel() + receive.numel())
        side = window.now.receive
        side.traffic.buffer.zero_()
        side.copies.back()
        arrived = [
            apply(message, old)
            for message, old in zip(receive.split(received_sizes), _parts(side), strict=True)
            if len(old)
        ]
        side.copies.make()
        return all(arrived)

    def _messages(self, window: _Window) -> list[torch.Tensor]:
        """For each rank, empty where it wants nothing of this one."""
        for one in window:
            # Between moves there may be bytes that nothing fills; they count in the sums.
            one.send.traffic.buffer.zero_()
            one.send.copies.make()
        window.now.own.make()
        buffers = (_parts(one.send) for one in window)
        return [
            encoded(now, before) if len(now) else self._empty(0)
            for now, before in zip(*buffers, strict=True)
        ]

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def _parts(side: Side) -> Sequence[torch.Tensor]:
    """The part of a buffer that goes to each rank, or comes from it."""
    return side.traffic.buffer.split(list(side.traffic.sizes))
