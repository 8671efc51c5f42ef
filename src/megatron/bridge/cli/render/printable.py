"""Tables with untrusted text in them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from megatron.bridge.text.quoting import printable


class Printable:
    """Renders as what it wraps does, without anything in the text that a terminal would obey."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            if segment.text == "\n" or segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))
