"""How a command ends: errors become one message on stderr and an exit status.

    0     done
    1     verify and compare: the two sides differ
    2     the input cannot be used, the target exists, the disk is full; also wrong usage
    70    a fault of this program
    130   interrupted (Ctrl-C)
    141   the reader of the output went away
    143   terminated

A traceback is printed only with --debug or MEGATRON_BRIDGE_DEBUG=1.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import NoReturn

import typer

from megatron.bridge.cli.output import printable_lines
from megatron.bridge.errors import BridgeError

DIFFERENT = 1
BAD_INPUT = 2
INTERNAL_ERROR = 70
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

DEBUG_VARIABLE = "MEGATRON_BRIDGE_DEBUG"

debug: ContextVar[bool] = ContextVar("debug", default=False)
"""Whether --debug was given."""


def guarded[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Let a command end as this module says, whatever it raises."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BridgeError as error:
            _end(error.exit_status, _noted(f"error: {error}", error))
        except KeyboardInterrupt as error:
            _end(INTERRUPTED, _noted("interrupted", error))
        except BrokenPipeError:
            # What Python flushes at exit must not meet the broken pipe again.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            _end(BAD_INPUT, _noted(f"error: {_describe(error)}", error))
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:  # noqa: BLE001  (the last resort: said, and status 70)
            summary = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            _end(
                INTERNAL_ERROR,
                f"{_noted(f'internal error: {summary}', error)}\n"
                "This is a fault of megatron-bridge; --debug shows where it happened.",
            )

    return run


def _end(status: int, message: str) -> NoReturn:
    if debug.get() or os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    print(printable_lines(message), file=sys.stderr)  # noqa: T201
    raise typer.Exit(status) from None


def _noted(message: str, error: BaseException) -> str:
    """The message, and what was noted of the error on its way: what is left, how to go on."""
    return "\n".join([message, *getattr(error, "__notes__", ())])


def _describe(error: OSError) -> str:
    """The system's own words, with the file; for a full disk, what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{reason}; make room and run it again"
    return f"{where}{reason}"


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into an orderly end, so that unfinished output is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
