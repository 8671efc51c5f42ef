"""What the page cache holds after files were read: what it held before, and little else."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cached_files import skip_unless_known
from megatron.bridge.file_hints import cached_bytes, forget
from megatron.bridge.models.hf_pretrained.slice_reader import read_once
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.tensors.arrays import empty
from megatron.bridge.tensors.boxes import Box, box_shape

ROWS, COLUMNS = 5000, 1300
NBYTES = 4 * ROWS * COLUMNS


@pytest.fixture
def file(tmp_path: Path) -> int:
    """A descriptor of a file with one tensor, none of which is in the cache."""
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)}, path)
    descriptor = os.open(path, os.O_RDWR)
    skip_unless_known(tmp_path, descriptor)
    os.fsync(descriptor)
    for _ in range(50):  # pages that another processor has just touched are dropped later
        forget(descriptor)
        if not cached_bytes(descriptor):
            break
        time.sleep(0.1)
    assert cached_bytes(descriptor) == 0
    return descriptor


def read(folder: Path, box: Box, *, once: bool) -> None:
    index = TensorIndex.from_folder(folder)
    out = empty(box_shape(box), "F32")

    def work() -> None:
        if once:
            read_once()
        index.read_into("t", box, out)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (first, _), (column, end) = box
    assert out[0, 0] == first * COLUMNS + column
    assert out[-1, -1] == (box[0][1] - 1) * COLUMNS + end - 1


WHOLE: Box = ((0, ROWS), (0, COLUMNS))
SOME_COLUMNS: Box = ((0, ROWS), (7, 900))


def test_a_cold_file_stays_cold(file: int, tmp_path: Path) -> None:
    read(tmp_path, WHOLE, once=True)
    assert cached_bytes(file) < NBYTES // 2  # not those that lie across two ranges


def test_others_read_as_ever(file: int, tmp_path: Path) -> None:
    read(tmp_path, WHOLE, once=False)
    assert cached_bytes(file) >= NBYTES


def test_a_warm_file_stays_warm(file: int, tmp_path: Path) -> None:
    read(tmp_path, WHOLE, once=False)
    read(tmp_path, WHOLE, once=True)
    assert cached_bytes(file) >= NBYTES


def test_rows_of_which_more_is_wanted_stay(file: int, tmp_path: Path) -> None:
    read(tmp_path, SOME_COLUMNS, once=True)
    assert cached_bytes(file) >= NBYTES - (1 << 20)
