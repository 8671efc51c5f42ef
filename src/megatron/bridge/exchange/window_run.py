"""Running an exchange, window by window: while one is under way, the next is packed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.buffer_views import Destination, PackedWindow, Packing
from megatron.bridge.exchange.route import Moves, Routes
from megatron.bridge.exchange.transport import Transport, Wait
from megatron.bridge.exchange.windows import Schedule, schedule
from megatron.bridge.runtime.lost_ranks import naming_lost
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.boxes import volume

_BUFFERS = 2
"""Of each direction: one is under way while the other is packed or unpacked."""


_MESSAGES = 256
"""What is this part of a window or more is a message of its own: there are no more than so many."""


class _UnderWay(NamedTuple):
    window: PackedWindow
    wait: Wait


class Exchange:
    """What a rank does in an exchange, ready to be done again and again.

    Args:
        routes: of all ranks.
        ranks: all of them make one, and do all that follows together.
        transport: moves the bytes.
        window_bytes: see `schedule`.
        device: where the buffers are.
        by_turns: whether tensors go in such an order that all ranks have something to send all
            the time, instead of one after another in that of the plan.

    Attributes:
        moves: of this rank.
        schedule: of the windows.
    """

    def __init__(
        self,
        routes: Routes,
        ranks: Ranks,
        transport: Transport,
        window_bytes: int,
        device: torch.device,
        *,
        by_turns: bool = False,
    ) -> None:
        self._ranks, self._transport = ranks, transport
        self._plan, self._device = routes.plan, device
        # Devices with memory of their own pack at many times the speed of a link.
        packs_all = device.type != "cpu" or not transport.takes_messages
        packs_all = any(ranks.largest([packs_all], device))
        self._message_bytes = None if packs_all else -(-window_bytes // _MESSAGES)

        def prepared() -> Moves:
            routes.check()
            return routes.of(ranks.index)

        self.moves = ranks.together(prepared)
        self.schedule: Schedule = schedule(
            routes.plan,
            routes.places if by_turns else dict.fromkeys(routes.names),
            self.moves,
            window_bytes,
            lambda own: ranks.largest(own, device),
        )
        sizes = [
            max(self.schedule.nbytes(moves), default=0)
            for moves in (self.moves.sent, self.moves.received)
        ]
        # Where there is no memory for them, all ranks are told.
        self._send, self._receive = ranks.agreed(
            lambda: [
                [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
                for size in sizes
            ],
            device,
        )

    @property
    def count(self) -> int:
        """How many windows there are."""
        return len(self.schedule.windows)

    def complete_in(self, number: int) -> list[str]:
        """The tensors of which the last part is in a window, in order."""
        return [
            unit.name
            for unit in self.schedule.windows[number]
            if unit.part == self.schedule.cutting.parts[unit.name] - 1
        ]

    @property
    def own_bytes(self) -> int:
        """That this rank holds and wants."""
        return sum(
            volume(move.box) * itemsize(self._plan.hf[name].dtype)
            for name, moves in self.moves.own.items()
            for move in moves
        )

    @property
    def buffer_bytes(self) -> int:
        """That the buffers of this rank take."""
        return sum(buffer.nbytes for buffer in (*self._send, *self._receive))

    def packed(
        self,
        number: int,
        packing: Packing,
        destination: Destination,
        buffer: int | None = None,
    ) -> PackedWindow:
        """The views of one window.

        Args:
            number: of the window.
            packing: of what this rank holds.
            destination: of what it wants; the memory has to stay where it is until the window is
                done.
            buffer: which of two buffers of each direction has all of it; None for a window that is
                `run`, of which what is large enough may go past the buffers.
        """
        message_bytes = self._message_bytes if buffer is None else None
        buffer = number % _BUFFERS if buffer is None else buffer
        sent, received, own = (self.schedule.pieces(number, one) for one in self.moves)
        return packing.window(
            sent,
            received,
            own,
            self._send[buffer],
            self._receive[buffer],
            destination,
            message_bytes,
        )

    def run(self, windows: Iterable[PackedWindow], sure: Collection[int] = ()) -> Iterator[int]:
        """Move all windows; every rank does this.

        Args:
            windows: those of `packed`, in order; each is asked for when it is to be packed.
            sure: numbers of those whose views are made, and of which no rank computes anything:
                nothing can keep a rank from sending them, and so none asks the others.

        Yields:
            The number of each window, when all of it has arrived on this rank.

        Raises:
            InputError: another rank cannot go on, or is gone.
            InexactCast: values do not fit the dtype that they are to have.
        """
        windows = iter(windows)
        under_way: _UnderWay | None = None

        def pack() -> PackedWindow:
            window = next(windows)
            window.send.copies.make()
            window.own.make()
            return window

        for number in range(self.count):
            try:
                window = pack() if number in sure else self._ranks.agreed(pack, self._device)
            except Exception:
                if under_way is not None:
                    with suppress(Exception):  # nothing may arrive after this
                        under_way.wait()
                raise
            with naming_lost(self._ranks.group):
                wait = self._transport.start(window.send.traffic, window.receive.traffic)
            if under_way is not None:
                self._finish(under_way)
                try:
                    yield number - 1
                except GeneratorExit:
                    self._leave(number, wait)
                    raise
            under_way = _UnderWay(window, wait)
        if under_way is not None:
            self._finish(under_way)
            yield self.count - 1

    def _finish(self, under_way: _UnderWay) -> None:
        with naming_lost(self._ranks.group):
            under_way.wait()
        under_way.window.receive.copies.make()

    def _leave(self, number: int, wait: Wait) -> None:
        """Tell the others, which else would wait, that this rank takes part no longer.

        Args:
            number: of the window that is under way.
            wait: returns when it is done.
        """

        def left() -> None:
            raise InputError("it left before the end; every rank goes on to the last tensor")

        with suppress(Exception):  # nobody is there to take it
            wait()
            if number + 1 < self.count:
                self._ranks.agreed(left, self._device)
