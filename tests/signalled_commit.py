"""A commit that gets a signal before each of its lines, of which every n-th is tried.

The process forks when the commit begins: each child goes on from there to its end, with a signal at
another line. Between them the unfinished target is put back as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from unfinished_target import names, tree

PACKAGE = f"megatron{os.sep}bridge{os.sep}"
KEPT = ".saved"


def signal_at_every_line(
    owner: Any, function: str, home: Path, number: signal.Signals, stride: int = 1
) -> None:
    """Let `owner.function` begin what is tried. Prints what each child ended with, as JSON.

    [status, names in the folder, files of the target, where the signal came] of each, in order.
    """
    original = getattr(owner, function)

    def begin(*args: Any, **kwargs: Any) -> Any:
        shutil.copytree(home, home.parent / KEPT, symlinks=True)
        outcomes = []
        for step in range(1, 100_000, stride):
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.close(reader)
                _trace(step, number, writer)
                return original(*args, **kwargs)
            os.close(writer)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            where = os.read(reader, 1000).decode()
            os.close(reader)
            files = {name: len(data) for name, data in tree(home / "out").items()}
            outcomes.append((status, names(home), files, where))
            if not where:
                break
            shutil.rmtree(home)
            shutil.copytree(home.parent / KEPT, home, symlinks=True)
        print(json.dumps(outcomes), file=sys.__stdout__, flush=True)
        os._exit(0)

    setattr(owner, function, begin)


def ends(run: Callable[[], int]) -> None:
    """End this process with what `run` gives."""
    try:
        status = run()
    except KeyboardInterrupt:
        status = 130
    os._exit(status)


def _trace(step: int, number: signal.Signals, writer: int) -> None:
    left = step

    def line(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal left
        # Putting the handlers back is one step: signals that come then come after the end.
        if PACKAGE not in frame.f_code.co_filename or frame.f_code.co_name == "let_go":
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.write(writer, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}".encode())
                os.kill(os.getpid(), number)
        return line

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        frame.f_trace = line
        frame = frame.f_back
    sys.settrace(line)
