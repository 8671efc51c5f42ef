"""One run of a process: how long it took, and what it took of processor and memory.

The process prints one JSON document that says how many `seconds` its work took by its own clock.
The document arrives when the work is over, so the work began so many seconds before: what lies
ahead is the start of the interpreter, with its imports, what lies behind is its end. Of a process
whose document says nothing of seconds, all is work.
"""

from __future__ import annotations

import compileall
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.bridge

_PERIOD_SECONDS = 0.01
_SAMPLES_PER_SEARCH = 5
"""Children are looked for with every so many samples."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """A benchmark that cannot be run, or whose result is wrong."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of a process and of those that it started.

    Of `wall_seconds`, its start took `start_seconds` and its work `seconds`; the rest is its end.
    Of `cpu_seconds`, its start took `start_cpu_seconds`. Memory is anonymous or shared: pages of
    files do not count. `peak_bytes` is the most, `start_bytes` what the interpreter and its
    imports held when the work began.
    """

    wall_seconds: float
    start_seconds: float
    seconds: float
    cpu_seconds: float
    start_cpu_seconds: float
    peak_bytes: int
    start_bytes: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """At a moment of `time.perf_counter`: the memory of all processes, the first one's CPU time."""

    moment: float
    nbytes: int
    cpu_seconds: float


def compile_package() -> None:
    """Compile what the commands import, as an installer does.

    Of a checkout that is done by whoever runs it first, and by everyone, each time, where
    PYTHONDONTWRITEBYTECODE is set.
    """
    for folder in megatron.bridge.__path__:
        compileall.compile_dir(folder, quiet=2)


def run(command: Sequence[str]) -> tuple[Measurement, dict[str, Any]]:
    """Run a command and measure it; returns its JSON document, too.

    Raises BenchmarkError, with what it wrote to stderr, if it fails.
    """
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        samples = _Sampler(process.pid)
        try:
            samples.start()
            output, printed = _read(process)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # and those that it started
            process.wait()
            raise
        finally:
            samples.stop()
        ended = time.perf_counter()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
            raise BenchmarkError(
                f"exit status {process.returncode}: {' '.join(command)}\n{message}"
            )
    document = json.loads(output)
    seconds = document.get("seconds", ended - began)
    started = printed - seconds if "seconds" in document else began
    at_work = samples.at(started)
    return Measurement(
        wall_seconds=ended - began,
        start_seconds=started - began,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        start_cpu_seconds=at_work.cpu_seconds,
        peak_bytes=samples.peak_bytes,
        start_bytes=at_work.nbytes,
    ), document


def _read(process: subprocess.Popen[bytes]) -> tuple[bytes, float]:
    """All of stdout, and the moment when its first bytes came."""
    if process.stdout is None:
        raise BenchmarkError("stdout is not a pipe")
    with process.stdout as stdout:
        first = os.read(stdout.fileno(), 1 << 16)
        moment = time.perf_counter()
        return first + stdout.read(), moment


class _Sampler:
    """Samples of a process and of those that it started, taken until it ends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._samples: list[_Sample] = []

    def start(self) -> None:
        """Take the first sample soon."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more."""
        self._done.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """The most memory seen."""
        return max((sample.nbytes for sample in self._samples), default=0)

    def at(self, moment: float) -> _Sample:
        """The last sample before `moment`; a process that had just begun held nothing."""
        earlier = [sample for sample in self._samples if sample.moment <= moment]
        return earlier[-1] if earlier else _Sample(moment, 0, 0.0)

    def _sample(self) -> None:
        number = 0
        found: set[int] = set()
        while True:
            if number % _SAMPLES_PER_SEARCH == 0:
                # A child that is about to become another program shares its parent's memory until
                # then, so one counts from the second time on that it is seen.
                before, found = found, set(_descendants(self._pid))
                children = before & found
            nbytes = sum(map(_memory, (self._pid, *children)))
            cpu_seconds = _cpu_seconds(self._pid)
            if cpu_seconds is not None:
                self._samples.append(_Sample(time.perf_counter(), nbytes, cpu_seconds))
            number += 1
            if self._done.wait(_PERIOD_SECONDS):
                return


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for task in tasks:
        for child in _text(task / "children").split():
            yield int(child)
            yield from _descendants(int(child))


def _memory(pid: int) -> int:
    """Bytes of anonymous and of shared memory; 0 for a process that has ended."""
    kibibytes = 0
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kibibytes += int(line.split()[1])
    return kibibytes * 1024


def _cpu_seconds(pid: int) -> float | None:
    """User and system time; None for a process that has ended."""
    # The name of the program, in brackets, may hold blanks: fields 14 and 15 are counted from it.
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND if fields else None


def _text(file: Path) -> str:
    """What the kernel says; nothing if the process is gone."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
