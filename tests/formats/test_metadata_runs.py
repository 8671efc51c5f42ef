"""Runs of chunks in an index that are taken at once: the result is that of their operations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.torch_dist import metadata as reading
from megatron.bridge.formats.torch_dist.metadata import Metadata, StoredChunk, read_metadata
from megatron.bridge.formats.torch_dist.metadata_runs import MetadataRuns
from megatron.bridge.formats.torch_dist.metadata_writer import metadata_bytes
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.spec import TensorSpec

LONG = 1 << 33


class NoRuns(MetadataRuns):
    """Takes nothing: every operation is read."""

    def __call__(self, position: int, *_: object) -> int:
        return position


def index() -> bytes:
    """All lengths of numbers, of places and of references, an object among the tensors."""
    shapes = {"a": (5,), "b": (7, 300), "c": (2, 3, 70_000), "d": (2, 1, 5, 1, 3), "scalar": ()}
    tensors = {key: TensorSpec(key, shape, "BF16") for key, shape in shapes.items()}
    tensors |= {f"many.{number}": TensorSpec(f"many.{number}", (9,), "F32") for number in range(3)}
    chunks: list[StoredChunk] = []
    for key, spec in tensors.items():
        rest: Box = tuple((0, size) for size in spec.shape[1:])
        boxes: list[Box] = [((0, 1), *rest), ((1, spec.shape[0]), *rest)] if spec.shape else [()]
        for box in boxes:
            chunks.append(StoredChunk(key, box, f"__{len(chunks) % 2}_0.distcp", LONG >> 3, 999))
    objects = [StoredChunk("extra", (), "__0_0.distcp", LONG * 70, 9)]
    return metadata_bytes(tensors, ["extra"], [*chunks, *objects])


def outcome(folder: Path, data: bytes) -> Metadata | None:
    (folder / ".metadata").write_bytes(data)
    try:
        return read_metadata(folder)
    except CheckpointError:
        return None


def mutated(data: bytes, place: int, how: random.Random) -> bytes:
    """An index with one byte replaced, left out or put in, or cut there."""
    other = bytes([how.choice((how.randrange(256), data[place] ^ 1 << how.randrange(8)))])
    kind = how.choice(("replaced", "replaced", "replaced", "of another", "out", "in", "cut"))
    if kind == "of another":
        other = data[(start := how.randrange(len(data))) : start + 1]
    if kind == "cut":
        return data[:place]
    return data[:place] + (b"" if kind == "out" else other) + data[place + (kind != "in") :]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mutated_index_is_the_same_with_and_without(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, how = index(), random.Random(7)
    indexes = [data, *(mutated(data, place, how) for place in range(0, len(data), step))]
    with_runs = [outcome(tmp_path, one) for one in indexes]
    monkeypatch.setattr(reading, "MetadataRuns", NoRuns)
    without = [outcome(tmp_path, one) for one in indexes]
    assert with_runs[0] is not None
    assert with_runs == without
    assert 0 < with_runs.count(None) < len(indexes)
