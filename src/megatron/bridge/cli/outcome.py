"""How a command ends: errors become one message on stderr and an exit status.

    0     done
    1     verify and compare: the two sides differ
    2     the input cannot be used, the target exists, the disk is full; also wrong usage
    70    a fault of this program
    130   interrupted (Ctrl-C)
    141   the reader of the output went away
    143   terminated

With --json, an error is the document on stdout, too, unless the result stands there already.
A traceback is printed only with --debug or MEGATRON_BRIDGE_DEBUG=1.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import FrameType
from typing import NoReturn

import click
from click.exceptions import Exit, NoArgsIsHelpError

from megatron.bridge.cli import output
from megatron.bridge.cli.output import say
from megatron.bridge.cli.streams import print_nothing_more
from megatron.bridge.errors import BridgeError, InputError

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
        as_json = bool(kwargs.get("as_json"))
        output.shown.set(False)
        try:
            command(*args, **kwargs)
        except BridgeError as error:
            _end(error.exit_status, error, f"error: {error}", as_json=as_json)
        except KeyboardInterrupt as error:
            _end(INTERRUPTED, error, "interrupted", as_json=as_json)
        except BrokenPipeError:
            print_nothing_more()
            raise Exit(BROKEN_PIPE) from None
        except OSError as error:
            _end(BAD_INPUT, error, f"error: {_describe(error)}", as_json=as_json)
        except (Exit, click.UsageError):
            raise
        except Exception as error:  # noqa: BLE001  (the last resort: said, and status 70)
            summary = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            error.add_note("This is a fault of megatron-bridge; --debug shows where it happened.")
            _end(INTERNAL_ERROR, error, f"internal error: {summary}", as_json=as_json)

    return run


def misused(error: click.ClickException, *, as_json: bool) -> int:
    """Say what is wrong with the arguments; returns the exit status."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if isinstance(error, NoArgsIsHelpError):
        say(message)
    else:
        say(f"error: {message}")
        # What is said of a value says all; of a name that is missing or unknown it does not.
        if context is not None and type(error) is not click.BadParameter:
            say(f"usage: {' '.join(context.get_usage().split()[1:])}")
    _show_document(error.exit_code, error, message, as_json=as_json)
    return error.exit_code


def unprinted(error: OSError) -> int:
    """The exit status where stdout does not take a help text."""
    print_nothing_more()
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    say(f"error: stdout: {error.strerror or error}")
    return BAD_INPUT


def _end(status: int, error: BaseException, message: str, *, as_json: bool) -> NoReturn:
    """Say the message, and what was noted of the error on its way: what is left, how to go on."""
    if debug.get() or os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    message = "\n".join([message, *getattr(error, "__notes__", ())])
    say(message)
    _show_document(status, error, message.removeprefix("error: "), as_json=as_json)
    raise Exit(status) from None


def _show_document(status: int, error: BaseException, message: str, *, as_json: bool) -> None:
    """With --json, show the error as a document.

    Of the processes that torchrun started, one writes to the stdout that all share.
    """
    if as_json and not output.shown.get() and os.environ.get("RANK", "0") == "0":
        problems = list(getattr(error, "problems", ()))
        said = {"kind": type(error).__name__, "message": message, "exit_status": status}
        said |= {"problems": problems} if problems else {}
        try:
            output.write_document(sys.stdout, {"error": said})
        except BrokenPipeError:
            print_nothing_more()
        except InputError as fault:
            say(f"error: {fault}")


def _describe(error: OSError) -> str:
    """The system's own words, with the file; for a full disk, what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{reason}; make room and run it again"
    return f"{where}{reason}"


def terminable(*, for_good: bool) -> AbstractContextManager[None]:
    """Turn SIGTERM into an orderly end, so that unfinished output is removed.

    Args:
        for_good: whether the process ends with the command.
    """
    from megatron.bridge.target.interruption import orderly_end

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(TERMINATED)

    return orderly_end(leave, for_good=for_good)
