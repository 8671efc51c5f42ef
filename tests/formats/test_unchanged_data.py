"""Saved tensors whose data are ranges of other files, and data in another order of their axes."""

from __future__ import annotations

import io
import itertools
import random
import warnings
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron.bridge.dtypes import itemsize
from megatron.bridge.engine.block_sharing import TensorBytes, TensorRange
from megatron.bridge.engine.pieces import OutputFile, pieces_of
from megatron.bridge.engine.shared_blocks import BLOCK_BYTES
from megatron.bridge.formats.torch_dist import saved_tensor_reader
from megatron.bridge.formats.torch_dist.file_layout import torch_dist_files
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.formats.torch_dist.saved_tensor import SavedHead, SavedTail
from megatron.bridge.formats.torch_dist.saved_tensor_reader import FoundTensor, find_saved_tensor
from megatron.bridge.models.conversion.unchanged import Chunk, DataRange
from megatron.bridge.tensors.boxes import box_shape, full_box
from megatron.bridge.tensors.spec import TensorSpec
from written_pieces import content_of

# --- one saved tensor ---


def find(blob: bytes, dtype: str, shape: tuple[int, ...]) -> FoundTensor:
    return find_saved_tensor(lambda at, count: blob[at : at + count], len(blob), dtype, shape)


def assert_found(blob: bytes, found: FoundTensor, expected: torch.Tensor) -> None:
    """The data, taken in the order that was found, are the tensor's elements."""
    nbytes = prod(found.shape) * itemsize(found.dtype)
    data = np.frombuffer(blob[found.offset : found.offset + nbytes], np.int16)
    ordered = data.reshape([found.shape[axis] for axis in found.order])
    assert np.array_equal(
        ordered.transpose(np.argsort(found.order)), expected.view(torch.int16).numpy()
    )


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1, prod(shape) + 1, dtype=torch.int16).view(torch.bfloat16).view(shape)


@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 3), (1, 6, 5), (4, 1, 3), (2, 3, 1, 5)])
def test_any_order_of_axes_is_found(shape: tuple[int, ...]) -> None:
    tensor = numbered(shape)
    for order in itertools.permutations(range(len(shape))):
        inverse = [order.index(axis) for axis in range(len(shape))]
        other = tensor.permute(order).contiguous().permute(inverse)
        assert torch.equal(other, tensor)
        buffer = io.BytesIO()
        torch.save(other, buffer)
        blob = buffer.getvalue()
        found = find(blob, "BF16", shape)
        assert (found.shape, found.dtype) == (shape, "BF16")
        assert_found(blob, found, tensor)


@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 3), (1, 1, 64, 48), (300, 1), (1, 300), (1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gap", [0, 4095])
def test_a_frame_around_data(
    shape: tuple[int, ...], transposed: bool, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch loads it, and so do we, without looking at it as a zip file."""
    tensor = numbered(shape)
    stored = tensor.transpose(-1, -2) if transposed else tensor
    data = stored.contiguous().view(torch.int16).numpy().tobytes()
    head = SavedHead(gap, "BF16", shape, transposed)
    tail = SavedTail("BF16", shape, transposed)
    whole = content_of((head,)) + data + content_of((tail,))
    assert len(whole) == head.nbytes + len(data) + tail.nbytes
    assert whole[:gap] == bytes(gap)
    blob = whole[gap:]
    loaded = torch.load(io.BytesIO(blob), weights_only=True)
    assert torch.equal(loaded, tensor)
    if not transposed:
        assert loaded.is_contiguous()
    monkeypatch.setattr(saved_tensor_reader, "_find", None)
    found = find(blob, "BF16", shape)
    assert_found(blob, found, tensor)
    assert gap + found.offset == head.nbytes


# --- a checkpoint ---

PIECE = 12 * BLOCK_BYTES
SHAPES = {"plain": (2, 90, 200), "turned": (3, 130, 96), "odd": (7, 1001), "made": (40, 33)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file with the data of all tensors, each beginning anywhere in a block."""
    path = tmp_path / "source"
    path.write_bytes(random.Random(3).randbytes(1 << 20))
    return path


def begins() -> dict[str, int]:
    return {"plain": 1234, "turned": 200_002, "odd": 500_001, "made": 0}


def chunks(source: Path) -> list[Chunk]:
    found = []
    for key, shape in SHAPES.items():
        if key == "made":
            found.append(Chunk(key, full_box(shape)))
            continue
        size, position = prod(shape[1:]) * 2, begins()[key]
        for row in range(shape[0]):
            box = ((row, row + 1), *full_box(shape[1:]))
            data = DataRange(source, position + row * size, key == "turned")
            found.append(Chunk(key, box, data))
    return found


def tensors_of(source: Path) -> dict[str, Any]:
    """What the checkpoint should hold, as integers."""
    content = source.read_bytes()
    found = {}
    for key, shape in SHAPES.items():
        begin = begins()[key]
        data = np.frombuffer(content[begin : begin + prod(shape) * 2], np.int16)
        if key == "turned":
            found[key] = data.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2)
        else:
            found[key] = data.reshape(shape)
    return found


def laid_out(source: Path, max_file_bytes: int = 1 << 29) -> tuple[OutputFile, ...]:
    specs = {key: TensorSpec(key, shape, "I16") for key, shape in SHAPES.items()}
    return torch_dist_files(
        specs, [chunks(source)], max_file_bytes=max_file_bytes, piece_bytes=PIECE
    )


def test_data_lie_in_a_block_as_in_the_source(source: Path) -> None:
    ranges = 0
    for file in laid_out(source):
        position = 0
        for part in file.parts:
            if isinstance(part, TensorRange):
                ranges += 1
                assert (position - part.offset) % BLOCK_BYTES == 0
                assert part.nbytes <= PIECE
            position += part.nbytes
        assert position == file.nbytes
        assert all(piece.nbytes <= PIECE for piece in pieces_of(file, PIECE))
    assert ranges > 10


def test_files_are_no_longer_than_asked_for(source: Path) -> None:
    files = laid_out(source, max_file_bytes=3 * PIECE)
    data = [file.nbytes for file in files if file.name.endswith(".distcp")]
    assert len(data) > 2
    assert max(data) <= 3 * PIECE
    assert laid_out(source, max_file_bytes=3 * PIECE) == files


@pytest.mark.parametrize("max_file_bytes", [3 * PIECE, 1 << 29])
def test_stock_torch_and_we_read_it(source: Path, tmp_path: Path, max_file_bytes: int) -> None:
    expected, folder = tensors_of(source), tmp_path / "checkpoint"
    folder.mkdir()

    def fill(key: str, box: Any, out: Any) -> None:
        out[...] = expected[key][tuple(slice(*bounds) for bounds in box)]

    for file in laid_out(source, max_file_bytes):
        content = bytearray(file.nbytes)
        position = 0
        for part in file.parts:
            out = memoryview(content)[position : position + part.nbytes]
            part.write_to(out, fill)
            if isinstance(part, TensorRange):  # filled or shared, it holds the same bytes
                assert out == content_of((TensorBytes(part.path, part.offset, part.nbytes),))
            position += part.nbytes
        (folder / file.name).write_bytes(content)
    state = {key: torch.zeros(shape, dtype=torch.int16) for key, shape in SHAPES.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    checkpoint = TorchDistCheckpoint(folder)
    chance = random.Random(1)
    for key, shape in SHAPES.items():
        assert np.array_equal(state[key].numpy(), expected[key]), key
        for _ in range(20):
            box = tuple(sorted(chance.sample(range(size + 1), 2)) for size in shape)
            box = tuple((first, last) for first, last in box)
            out = np.zeros(box_shape(box), np.int16)
            checkpoint.read_into(key, box, out)
            assert np.array_equal(out, expected[key][tuple(slice(*bounds) for bounds in box)])
