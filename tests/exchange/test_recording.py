"""What loaders of engines put where: recorded without data, and compared with running them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from exchange.engine_loaders import PARTS, Engine
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.recording import Recording, record
from megatron.bridge.tensors.boxes import slices
from megatron.bridge.tensors.spec import TensorSpec


def filled(recording: Recording, tensors: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """Do what was recorded."""
    for landing in recording.landings(parameters):
        landing.out.copy_(tensors[landing.name][slices(landing.box)])
    for place in recording.zeros:
        place.of(parameters).zero_()


def drawn(specs: Iterable[TensorSpec]) -> dict[str, Tensor]:
    """No element like another, as far as there are so many of them."""
    generator = torch.Generator().manual_seed(4)
    return {
        spec.name: torch.randn(spec.shape, generator=generator).to(torch.bfloat16) for spec in specs
    }


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_what_is_recorded_is_what_the_loader_does(part: str, tp: int, rank: int) -> None:
    loaded, recorded = Engine(tp, rank), Engine(tp, rank)
    for engine in (loaded, recorded):
        PARTS[part](engine)
    tensors = drawn(loaded.specs)
    recording = record(recorded.load_weights, recorded.specs, recorded.parameters)
    for parameter in recorded.parameters.values():
        assert (parameter == 77).all()  # nothing was written
    loaded.load_weights(tensors.items())
    told = pickle.loads(pickle.dumps(recording))
    assert told == recording
    json.dumps(asdict(recording))
    filled(told, tensors, dict(recorded.parameters))
    for name, parameter in loaded.parameters.items():
        assert torch.equal(parameter, recorded.parameters[name]), name


def test_boxes_are_as_few_as_the_loader_allows() -> None:
    engine = Engine(2, 1)
    PARTS["vision"](engine)
    recording = record(engine.load_weights, engine.specs, engine.parameters)
    boxes = [one.box for one in recording.copies if one.name == "visual.qkv"]
    assert boxes == [
        ((12, 24), (0, 24)),
        ((36, 48), (0, 24)),
        ((60, 72), (0, 24)),
    ]
    assert [one.box for one in recording.copies if one.name == "patch_embed"] == [
        ((0, 24), (0, 3), (0, 2), (0, 4), (0, 5))
    ]


def test_what_is_not_taken_is_named() -> None:
    engine = Engine(4, 1)
    PARTS["expert parallel"](engine)
    recording = record(engine.load_weights, engine.specs, engine.parameters)
    assert recording.unused == tuple(
        sorted(name for name in engine.shapes if name.split(".")[1] not in "23")
    )


# --- one tensor, one parameter ---

SPEC = TensorSpec("weight", (6, 4, 10), "F32")


def run(
    load: Callable[[Tensor, Tensor], object],
    parameter: Tensor,
    spec: TensorSpec = SPEC,
    not_loaded: tuple[str, ...] = (),
) -> Recording:
    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            load(parameter, weight)

    return record(load_weights, [spec], {"p": parameter}, not_loaded=not_loaded)


def scattered(param: Tensor, weight: Tensor) -> None:
    param[::2].copy_(weight[::2])
    param[1::2].copy_(weight[1::2])


def through_scratch(param: Tensor, weight: Tensor) -> None:
    """Put together in memory that is neither the one nor the other, part of it twice."""
    scratch = torch.zeros(8, 10, 4, dtype=weight.dtype)
    scratch[:6].copy_(weight.mT)
    scratch[0].copy_(weight[5].t())
    param.copy_(scratch.permute(1, 0, 2)[:, :6])


MOVES: dict[str, tuple[Callable[[Tensor, Tensor], object], tuple[int, ...]]] = {
    "every second": (scattered, (6, 4, 10)),
    "scratch": (through_scratch, (10, 6, 4)),
    "flat": (lambda p, w: p.copy_(w.view(-1)[7:207]), (200,)),
    "rows of rows": (lambda p, w: p.view(4, 6, 10).copy_(w.transpose(0, 1)), (24, 10)),
    "merged": (lambda p, w: p.copy_(w.reshape(24, 10).t()), (10, 24)),
    "reshaped copy": (lambda p, w: p.copy_(w.permute(2, 0, 1).reshape(20, 12)), (20, 12)),
    "stack": (lambda p, w: p.copy_(torch.stack(w.unbind(1)[::-1])), (4, 6, 10)),
    "cat": (lambda p, w: p.copy_(torch.cat(w.split([2, 3, 5], -1)[::-1], -1)), (6, 4, 10)),
    "squeezed": (lambda p, w: p.copy_(w.unsqueeze(1)[:, 0].clone().flatten(1)), (6, 40)),
    "padded": (lambda p, w: p.copy_(torch.nn.functional.pad(w, (1, 2, 0, 1))), (6, 5, 13)),
    "cast": (lambda p, w: p.copy_(w.double().contiguous().float()), (6, 4, 10)),
    "device": (lambda p, w: p.data.copy_(w.to(p.device)), (6, 4, 10)),
}


@pytest.mark.parametrize("name", MOVES)
def test_elements_are_followed(name: str) -> None:
    load, shape = MOVES[name]
    weight = torch.arange(240.0).reshape(SPEC.shape)
    expected, found = torch.full(shape, -1.0), torch.full(shape, -1.0)
    load(expected, weight)
    filled(run(load, found), {"weight": weight}, {"p": found})
    assert torch.equal(found, expected)


def test_a_parameter_may_lie_transposed() -> None:
    weight = torch.arange(240.0).reshape(SPEC.shape)
    found = torch.full((10, 4, 6), -1.0).permute(2, 1, 0)
    filled(run(lambda p, w: p.copy_(w), found), {"weight": weight}, {"p": found})
    assert torch.equal(found, weight)


def test_parameters_may_share_a_storage() -> None:
    flat = torch.full((250,), -1.0)
    parameters = {"a": flat[5:65].view(6, 10), "b": flat[65:245].view(6, 3, 10)}
    weight = torch.arange(240.0).reshape(SPEC.shape)

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, one in weights:
            parameters["a"].copy_(one[:, 0])
            parameters["b"].copy_(one[:, 1:])

    filled(record(load_weights, [SPEC], parameters), {"weight": weight}, parameters)
    assert torch.equal(parameters["a"], weight[:, 0])
    assert torch.equal(parameters["b"], weight[:, 1:])
    assert (flat == -1).sum() == 10


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda p, w: p.copy_(w + 1), r"aten\.add\.Tensor computes with weight"),
        (lambda p, w: p.copy_(w.clone().mul_(2)), r"aten\.mul_\.Tensor computes with weight"),
        (lambda p, w: p.add_(w), r"aten\.add_\.Tensor computes with the parameter p"),
        (lambda p, w: p.copy_(w[[1, 0, 2, 3, 4, 5]]), r"aten\.index\.Tensor computes with weight"),
        (lambda p, w: p.fill_(w[0, 0, 0].item()), r"aten\._local_scalar_dense.* with weight"),
        (lambda p, w: p.copy_(w[:1]), r"aten\.copy_.* expands, from \(1, 4, 10\).* weight"),
        (lambda p, w: p.copy_(w[:1].expand(6, 4, 10)), r"expanded axes of weight"),
        (lambda p, w: p.copy_(torch.ones(6, 4, 10)), r"no offered tensor into the parameter p"),
        (lambda p, w: p.fill_(1.5), r"aten\.fill_\.Scalar puts the value 1\.5 into the para.* p"),
        (lambda p, w: w.copy_(p), r"aten\.copy_\.default changes weight"),
        (lambda p, w: p.copy_(w.view(torch.int32)), r"looks at the bytes of weight"),
        (lambda p, w: p.copy_(w.bfloat16()), r"rounds to torch\.bfloat16 on the way to p"),
        (lambda p, w: p.copy_(torch.empty(6, 4, 10)), r"that nothing filled of"),
        (lambda p, w: setattr(p, "data", torch.ones(6, 4, 10)), r"p: the loader puts other memory"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_by_boxes_is_refused(
    load: Callable[[Tensor, Tensor], object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        run(load, torch.nn.Parameter(torch.zeros(6, 4, 10), requires_grad=False))
    assert str(error.value).count("\n") < 6


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda p, w: None, "p: nothing fills it"),
        (lambda p, w: p[:5].copy_(w[:5]), r"p: \[5:6, 0:4, 0:10\] is not filled"),
        (lambda p, w: (p.copy_(w), p[2:4].zero_()), r"\[2:4, 0:4, 0:10\] is filled 2 times"),
    ],
)
def test_every_element_is_filled_once(
    load: Callable[[Tensor, Tensor], object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        run(load, torch.zeros(6, 4, 10))


def test_what_the_engine_leaves_alone_is_named() -> None:
    recording = run(lambda p, w: p[:5].copy_(w[:5]), torch.zeros(6, 4, 10), not_loaded=("p",))
    assert [one.box for one in recording.copies] == [((0, 5), (0, 4), (0, 10))]
    with pytest.raises(PlanError, match="not_loaded names 'q', which is no parameter"):
        run(lambda p, w: p.copy_(w), torch.zeros(6, 4, 10), not_loaded=("q",))
    with pytest.raises(PlanError, match="is filled 2 times"):
        run(lambda p, w: (p.zero_(), p.copy_(w)), torch.zeros(6, 4, 10), not_loaded=("p",))


def test_a_recording_is_of_one_model() -> None:
    recording = run(lambda p, w: p.copy_(w), torch.zeros(6, 4, 10))
    with pytest.raises(InputError, match=re.escape("the parameters have no 'p'")):
        recording.landings({"q": torch.zeros(6, 4, 10)})


def test_a_place_that_is_wrong_is_seen() -> None:
    """The comparison with the loader can fail."""
    load = MOVES["merged"][0]
    weight = torch.arange(240.0).reshape(SPEC.shape)
    expected, found = torch.zeros(10, 24), torch.zeros(10, 24)
    load(expected, weight)
    recording = run(load, found)
    [copy] = recording.copies
    moved = replace(copy, box=((0, 6), (0, 4), (0, 9)), place=replace(copy.place, shape=(6, 4, 9)))
    filled(replace(recording, copies=(moved,)), {"weight": weight}, {"p": found})
    assert not torch.equal(found, expected)
