"""For any bytes a reader gives a valid result or raises CheckpointError, and nothing else.

What is checked of a result is written in `targets`. The same inputs are tried in every run; `make
fuzz` looks further.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import targets
from fuzz.mutation import PICKLES, VALUES, damaged, json_text, spliced
from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import BridgeError, CheckpointError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.quantization import quantization_of
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.synthetic.config_settings import resolve_settings
from megatron.bridge.synthetic.family import find_family
from megatron.bridge.tensors.boxes import Box, tiling_faults

same_each_time = settings(derandomize=True, deadline=None, max_examples=200, database=None)

FAMILIES = ["qwen3-vl-moe", "qwen3.5-moe"]
"""Every key of the others is one of theirs."""


def seeds(name: str) -> list[bytes]:
    return targets.TARGETS[name][1]()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_honest_files_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the targets would check nothing."""
    refused: list[str] = []
    monkeypatch.setattr(CheckpointError, "__init__", lambda _, text: refused.append(text))
    target, make = targets.TARGETS[name]
    for seed in make():
        target(seed)
    # The data that the index speaks of are not there, and so TorchDistCheckpoint refuses it.
    assert all("__0_0.distcp is missing" in text for text in refused)


@pytest.mark.parametrize("name", targets.TARGETS)
@given(data=st.data())
@same_each_time
def test_any_bytes(name: str, data: st.DataObject) -> None:
    targets.TARGETS[name][0](data.draw(st.binary(max_size=200)))


@pytest.mark.parametrize("name", targets.TARGETS)
@given(data=st.data())
@same_each_time
def test_bytes_of_honest_files_moved_about(name: str, data: st.DataObject) -> None:
    honest = data.draw(st.sampled_from(seeds(name)))
    targets.TARGETS[name][0](data.draw(spliced(honest)))


@given(data=st.data())
@same_each_time
def test_headers_with_wrong_values(data: st.DataObject) -> None:
    honest = data.draw(st.sampled_from(seeds("header-text")))
    header = data.draw(damaged(json.loads(honest[:-2])))
    targets.header_text(json_text(header) + honest[-2:])


@given(data=st.data())
@same_each_time
def test_headers_that_fit_their_data(data: st.DataObject) -> None:
    """What is read most often: a few tensors whose sizes and offsets nearly fit."""
    header, position = {}, 0
    for name in data.draw(st.lists(st.sampled_from("abcd"), max_size=4)):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = data.draw(st.sampled_from(["U8", "BF16", "F32"]))
        size = prod(shape) * itemsize(dtype)
        begin = max(0, position + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1])))
        position = begin + size + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, position]}
    targets.header_text(json_text(header) + max(position, 0).to_bytes(2, "little"))


@given(data=st.data())
@same_each_time
def test_indexes_with_wrong_values(data: st.DataObject) -> None:
    index = data.draw(damaged(json.loads(seeds("index")[0])))
    targets.weight_index(json_text(index))


@given(data=PICKLES)
@same_each_time
def test_programs_of_the_pickle_machine(data: bytes) -> None:
    targets.checkpoint_metadata(data)


@given(data=st.data())
@settings(same_each_time, max_examples=100)
def test_metadata_with_wrong_values(data: st.DataObject) -> None:
    metadata = targets.example_metadata()
    objects: list[Any] = [metadata, *metadata.storage_data, *metadata.storage_data.values()]
    for entry in metadata.state_dict_metadata.values():
        objects += [entry, *getattr(entry, "chunks", [])]
    for _ in range(data.draw(st.integers(1, 2))):
        fields = vars(data.draw(st.sampled_from([o for o in objects if vars(o)])))
        name = data.draw(st.sampled_from(sorted(fields)))
        others = [vars(o)[name] for o in objects if name in vars(o)]
        fields[name] = copy.deepcopy(data.draw(VALUES | st.sampled_from(others)))
    try:
        pickled = pickle.dumps(metadata)
    except (TypeError, AttributeError, pickle.PicklingError):
        return  # not even Python can write it
    targets.checkpoint_metadata(pickled)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(same_each_time, max_examples=30)
def test_configs_with_wrong_values(family: str, data: st.DataObject) -> None:
    """A plan, or a word of what is wrong: never another exception, nor work without end."""
    honest = dict(resolve_settings(find_family(family), {}).config)
    text = json_text(data.draw(damaged(honest)))
    _outcome(lambda: _plan(text))


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_configs_are_planned(family: str) -> None:
    _plan(json_text(dict(resolve_settings(find_family(family), {}).config)))


def _outcome(action: Callable[[], None]) -> None:
    try:
        action()
    except BridgeError as error:
        assert error.exit_status == 2  # noqa: PT017


def _plan(text: bytes) -> None:
    try:
        config = HFConfig.from_dict(parse_object(text))
    except ValueError:
        return  # from_file makes it a ConfigError
    bridge = bridge_for(config.architecture)
    quantization_of(config)
    plan = bridge.plan_from_config(config, "BF16")
    bridge.provider_settings(config, "BF16")
    assert plan.hf_bytes > 0


# --- tilings: the readers of checkpoints rest on them ---


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    found = []
    for _ in range(draw(st.integers(0, 5))):
        starts = [draw(st.integers(0, size - 1)) for size in shape]
        found.append(
            tuple((a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True))
        )
    return shape, found


@given(boxes())
@settings(same_each_time, max_examples=500)
def test_tilings_are_told_from_all_others(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, found = case
    filled = Counter(
        cell for box in found for cell in product(*(range(start, stop) for start, stop in box))
    )
    cells = [*product(*map(range, shape))]
    faults = [*tiling_faults(shape, found)]
    assert bool(faults) == any(filled[cell] != 1 for cell in cells)
    if faults:  # it names the first
        first = next(cell for cell in cells if filled[cell] != 1)
        assert faults[0].startswith(
            "[" + ", ".join(f"{start}:" for start in first)[:-1].split(":")[0]
        )
        times = f"is filled {filled[first]} times" if filled[first] else "is not filled"
        assert faults[0].endswith(times)
