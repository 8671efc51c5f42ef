"""Where things go: results to stdout, everything else to stderr; with --json one document only."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from megatron.bridge.cli.streams import write_result
from megatron.bridge.models.hf_pretrained.download_bars import hide_download_bars
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.text.document import to_document
from megatron.bridge.text.quoting import printable

shown: ContextVar[bool] = ContextVar("shown", default=False)
"""Whether the command has shown its result."""

WIDTH = 100
"""Columns of the widest table."""


class Output:
    """The streams of one command. Make it by `open_output`."""

    def __init__(self, stdout: TextIO, *, as_json: bool) -> None:
        self._stdout = stdout
        self.as_json = as_json

    def progress(self) -> AbstractContextManager[Progress]:
        """Bars on a terminal, a line every tenth otherwise, nothing with --json."""
        if self.as_json:
            return contextlib.nullcontext(Silent())
        if sys.stderr.isatty():
            from megatron.bridge.cli.progress_display import progress_bars

            return progress_bars()
        from megatron.bridge.progress_lines import ProgressLines

        return contextlib.nullcontext(ProgressLines(sys.stderr))

    def note(self, message: str) -> None:
        """Say on stderr what is going on; not with --json."""
        if not self.as_json:
            say(message)

    def show(self, report: object) -> None:
        """Write the result: the report as a JSON document, or as tables."""
        if self.as_json:
            write_document(self._stdout, to_document(report))
        else:
            write_result(self._stdout, self._as_text(report))
        shown.set(True)

    def _as_text(self, report: object) -> str:
        """Tables, with colours on a terminal. rich would end the process on a closed pipe."""
        from rich.console import Console

        from megatron.bridge.cli.render import render
        from megatron.bridge.cli.render.printable import Printable

        width = min(Console(file=self._stdout).width, WIDTH) if self._stdout.isatty() else WIDTH
        console = Console(file=self._stdout, width=width, highlight=False)
        with console.capture() as captured:
            console.print(Printable(render(report)))
        return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def write_document(stdout: TextIO, document: Mapping[str, Any]) -> None:
    """Write a JSON document to stdout."""
    write_result(stdout, json.dumps(document, indent=2, allow_nan=False) + "\n")


def say(message: str) -> None:
    """Write a line on stderr, or several."""
    print(printable_lines(message), file=sys.stderr, flush=True)  # noqa: T201


def printable_lines(message: str) -> str:
    """The message with nothing in it that a terminal would obey but line feeds."""
    return "\n".join(map(printable, message.split("\n")))


@contextmanager
def open_output(*, as_json: bool) -> Iterator[Output]:
    """Give a command its streams; what libraries print inside the block goes to stderr."""
    stdout = sys.stdout
    bars = hide_download_bars() if as_json else contextlib.nullcontext()
    with contextlib.redirect_stdout(sys.stderr), bars:
        yield Output(stdout, as_json=as_json)
