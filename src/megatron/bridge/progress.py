"""How long work reports that it moves on; who shows it is somebody else's business."""

from typing import Protocol


class Progress(Protocol):
    """Told of a task with a known number of bytes, then of the bytes done."""

    def start(self, task: str, total_bytes: int) -> None:
        """A task begins; an earlier one, if any, is finished."""

    def advance(self, done_bytes: int) -> None:
        """So many more bytes are done."""


class Silent:
    """A Progress that shows nothing."""

    def start(self, task: str, total_bytes: int) -> None:
        """Nothing is shown."""

    def advance(self, done_bytes: int) -> None:
        """Nothing is shown."""
