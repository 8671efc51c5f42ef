"""Ranges of files that are boxes of a checkpoint: what the plan says, element by element."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.bridge.dtypes import itemsize
from megatron.bridge.models.conversion import unchanged
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.unchanged import Chunk, chunks_of
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.tensors.boxes import box_shape, slices, tiling_faults, volume
from plans_of import FAMILIES, plan, tensors_of

BEGIN = 1000
"""Where each tensor begins in its file."""


def planned(family: str, **options: Any) -> ConversionPlan:
    return plan(FAMILIES[family], tensors_of(FAMILIES[family]), **options)


def place_in(made: ConversionPlan) -> Any:
    """Each tensor in a file of its own, named like it."""

    def place(name: str) -> TensorInfo | None:
        spec = made.hf[name]
        return TensorInfo(name, spec.shape, spec.dtype, Path(name), BEGIN)

    return place


def sides(made: ConversionPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of both sides, each element of the Hugging Face side another number."""
    hf, count = {}, 1
    for name, spec in made.hf.items():
        size = prod(spec.shape)
        hf[name] = np.arange(count, count + size).reshape(spec.shape)
        count += size
    megatron = {key: np.zeros(spec.shape, int) for key, spec in made.megatron.items()}
    for copy in made.copies:
        part = hf[copy.hf_name][slices(copy.hf_box)]
        part = part.swapaxes(-1, -2) if copy.transpose else part
        shape = box_shape(copy.megatron_box)
        megatron[copy.megatron_key][slices(copy.megatron_box)] = part.reshape(shape)
    return hf, megatron


def check(made: ConversionPlan, chunks: list[Chunk]) -> None:
    hf, megatron = sides(made)
    for key, spec in made.megatron.items():
        boxes = [chunk.box for chunk in chunks if chunk.key == key]
        assert not list(tiling_faults(spec.shape, boxes)), key
    for chunk in chunks:
        if chunk.data is None:
            continue
        name, width = str(chunk.data.path), itemsize(made.megatron[chunk.key].dtype)
        first, rest = divmod(chunk.data.offset - BEGIN, width)
        assert not rest
        found = hf[name].reshape(-1)[first : first + volume(chunk.box)]
        shape = box_shape(chunk.box)
        if chunk.data.transposed:
            found = found.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
        assert np.array_equal(found.reshape(shape), megatron[chunk.key][slices(chunk.box)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strides", [True, False])
def test_a_range_holds_its_box(family: str, strides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors so small, all that can be a range is made one."""
    monkeypatch.setattr(unchanged, "_WORTH_A_CHUNK", 1)
    made = planned(family)
    chunks = list(chunks_of(made, place_in(made), strides=strides))
    check(made, chunks)
    turned = {chunk.key for chunk in chunks if chunk.data and chunk.data.transposed}
    assert bool(turned) == (strides and family == "vl-moe")
    ranges = sum(volume(chunk.box) for chunk in chunks if chunk.data)
    shifted = sum(volume(copy.hf_box) for copy in made.copies if copy.offset)
    columns = sum(volume(copy.hf_box) for copy in made.copies if copy.transpose)
    others = 0 if strides else columns
    assert ranges == sum(volume(copy.hf_box) for copy in made.copies) - shifted - others


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_too_small_stays_one_box(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged, "_WORTH_A_CHUNK", 1 << 20)
    made = planned(family)
    chunks = list(chunks_of(made, place_in(made)))
    assert chunks == [Chunk(parameter.key, parameter.box) for parameter in made.parameters]


def test_a_parameter_is_not_cut_into_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of queries, keys and values are cut where they are large on average."""
    made = planned("vl")
    key = "language_model.decoder.layers.self_attention.linear_qkv.weight"
    [layer, *_] = [one for one in made.parameters if one.key == key]
    copies = [copy for _, copy in made.copies_to(key, layer.box)]
    total = sum(volume(copy.hf_box) for copy in copies) * 2
    smallest = min(volume(copy.hf_box) for copy in copies) * 2
    for worth, count in ((smallest, len(copies)), (total // len(copies), 1), (total, 1)):
        monkeypatch.setattr(unchanged, "_WORTH_A_CHUNK", worth)
        chunks = [
            chunk
            for chunk in chunks_of(made, place_in(made))
            if chunk.key == key and chunk.box[0] == layer.box[0]
        ]
        assert len(chunks) == count


def test_what_is_computed_is_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without a place, of another dtype, and those whose elements are shifted."""
    monkeypatch.setattr(unchanged, "_WORTH_A_CHUNK", 1)
    made = planned("3.5")
    assert not any(chunk.data for chunk in chunks_of(made, lambda _: None))

    def other(name: str) -> TensorInfo | None:
        return TensorInfo(name, made.hf[name].shape, "F16", Path(name), BEGIN)

    assert not any(chunk.data for chunk in chunks_of(made, other))
    shifted = {copy.megatron_key for copy in made.copies if copy.offset}
    assert shifted
    chunks = list(chunks_of(made, place_in(made)))
    assert not any(chunk.data for chunk in chunks if chunk.key in shifted)
