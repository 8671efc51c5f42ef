"""What the kernel is told about ranges of files."""

import ctypes
import errno
import os
import time
from pathlib import Path

import pytest

from cached_files import skip_unless_known
from megatron.bridge import file_hints

LENGTH = 3_000_001


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    return os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)


def test_blocks_are_reserved(descriptor: int) -> None:
    file_hints.reserve(descriptor, LENGTH)
    found = os.fstat(descriptor)
    assert found.st_size == LENGTH
    assert found.st_blocks * 512 >= LENGTH


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve(
    code: int, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hints, "_LIBRARY", Failing([code]))
    file_hints.reserve(descriptor, LENGTH)
    assert not file_hints.start_writing(descriptor, 0, LENGTH)
    assert not file_hints.finish_writing(descriptor, 0, LENGTH)


def test_a_system_without_these_functions(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hints, "_LIBRARY", object())
    file_hints.reserve(descriptor, LENGTH)
    assert not file_hints.start_writing(descriptor, 0, LENGTH)


def test_what_the_disk_says_is_raised(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hints, "_LIBRARY", Failing([errno.ENOSPC]))
    with pytest.raises(OSError, match="No space left"):
        file_hints.reserve(descriptor, LENGTH)
    monkeypatch.setattr(file_hints, "_LIBRARY", Failing([errno.EIO]))
    with pytest.raises(OSError, match="Input/output error"):
        file_hints.finish_writing(descriptor, 0, LENGTH)


def test_a_signal_does_not_end_a_call(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Failing([errno.EINTR, errno.EINTR, 0])
    monkeypatch.setattr(file_hints, "_LIBRARY", library)
    assert file_hints.finish_writing(descriptor, 0, LENGTH)
    assert library.codes == []


def test_a_range_is_written_and_forgotten(descriptor: int, tmp_path: Path) -> None:
    os.pwrite(descriptor, b"abc" * 50_000, 0)
    assert file_hints.start_writing(descriptor, 0, 150_000)
    assert file_hints.finish_writing(descriptor, 0, 150_000)
    skip_unless_known(tmp_path, descriptor)
    assert file_hints.cached_bytes(descriptor) >= 150_000
    for _ in range(50):  # pages that another processor has just touched are dropped later
        file_hints.forget(descriptor)
        if not file_hints.cached_bytes(descriptor):
            break
        time.sleep(0.1)
    assert file_hints.cached_bytes(descriptor) == 0
    assert os.pread(descriptor, 6, 149_994) == b"abcabc"


class Failing:
    """A C library whose functions fail with these codes, 0 for success; the last one stays."""

    def __init__(self, codes: list[int]) -> None:
        self.codes = codes

    def __getattr__(self, name: str) -> object:
        def function(*arguments: object) -> int:
            code = self.codes[0]
            if len(self.codes) > 1 or not code:
                del self.codes[0]
            ctypes.set_errno(code)
            return -1 if code else 0

        return function
