"""stdout and stderr as they should be: printing never changes how a command ends, where it can."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from megatron.bridge.errors import InputError


@contextmanager
def sturdy_streams(*, for_good: bool) -> Iterator[None]:
    r"""Give the process streams that take every text, inside the block.

    A character that a stream cannot encode is written as an escape (``\u2500``). What stderr does
    not take is lost, and nothing else. A stream that the caller has closed is the null device.

    Args:
        for_good: whether to leave them so, since the process ends with the block.
    """
    before = sys.stdout, sys.stderr
    errors = [_escape(stream) for stream in before]
    sys.stdout = _open(before[0])
    sys.stderr = cast("TextIO", Unfailing(_open(before[1])))
    try:
        yield
    finally:
        if not for_good:
            sys.stdout, sys.stderr = before
            for stream, handling in zip(before, errors, strict=True):
                if handling is not None:
                    stream.reconfigure(errors=handling)  # type: ignore[union-attr]


class Unfailing:
    """A text stream whose writing never raises; from the first failure on, all is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if it can be."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._stream = _null()
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = _null()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_result(stdout: TextIO, text: str) -> None:
    """Write to stdout, all of it. Raises BrokenPipeError; InputError if it takes nothing more."""
    try:
        try:
            stdout.write(text)
        except UnicodeEncodeError as error:
            escaped = text.encode(error.encoding, "backslashreplace")
            stdout.write(escaped.decode(error.encoding))
        stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        print_nothing_more()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the result could not be written to stdout: {reason}") from error


def print_nothing_more() -> None:
    """Discard what is printed from here on, so that the flush at exit does not fail again."""
    sys.stdout = _null()


def _escape(stream: TextIO | None) -> str | None:
    """Let a stream escape what it cannot encode; how it did until now, None if it stays so."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        before: str = stream.errors  # type: ignore[union-attr,assignment]
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        return before
    return None


def _open(stream: TextIO | None) -> TextIO:
    """The stream; Python has none where the caller has closed it."""
    return _null() if stream is None or stream.closed else stream


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
