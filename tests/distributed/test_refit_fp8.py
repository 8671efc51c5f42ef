"""Refit into FP8: bit for bit what the whole weights are quantized to, whoever holds their blocks.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exchange_layouts import MODELS, QUICK, built, layout, make_models
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.dtypes import numpy_dtype, safetensors_dtype
from megatron.bridge.errors import BridgeError
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.formats.fp8_writer import block_scales, quantize
from megatron.bridge.live.refit import Refit
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.tensors.boxes import Box, full_box, slices
from megatron.bridge.tensors.torch_views import as_array, as_torch
from refit_targets import changed, wrong

type Tensors = dict[str, torch.Tensor]

BLOCK = BlockFP8(24, 40)
"""Divides neither the tensors nor what a rank holds of them."""
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 40]}
WINDOW = 100_000
WORLD = 4

FIRST: dict[str, Any] = {"tensor": QUICK["tensor"]}
OTHERS: dict[str, Any] = {
    "tensor_stages_experts": QUICK["tensor_stages_experts"],
    "transposed": QUICK["expert_tensors"],
}


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1 and "_proj" in name and tensor.dtype == torch.bfloat16


def quantized(exported: Tensors, scale_dtype: torch.dtype) -> Tensors:
    """What an FP8 release of the model has, made of whole tensors as files are."""
    found: Tensors = {}
    for name, tensor in exported.items():
        if not is_quantized(name, tensor):
            found[name] = tensor
            continue
        dtype = numpy_dtype(safetensors_dtype(scale_dtype))
        scales = block_scales(as_array(tensor), BLOCK, dtype)
        found[name] = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        quantize(as_array(tensor), scales, BLOCK, as_array(found[name]))
        found[name + SCALE_SUFFIX] = as_torch(scales).to(scale_dtype)
    return found


def part_of(number: int, shape: tuple[int, ...], rank: int) -> Box:
    """A third of the rows or columns to a rank, the last has what another has, too."""
    box = list(full_box(shape))
    if shape and shape[axis := number % len(shape)] > 2:
        size = shape[axis]
        start = (0, size // 3, size * 2 // 3, size // 5)[rank]
        box[axis] = start, min(size, start + -(-size // 3))
    return tuple(box)


def landings(release: Tensors, rank: int) -> list[Landing]:
    found = []
    for number, (name, tensor) in enumerate(release.items()):
        box = part_of(number, tuple(tensor.shape), rank)
        out = torch.zeros_like(tensor[slices(box)])
        if number % 2 and out.dim() > 1:
            out = torch.zeros_like(out.mT.contiguous()).mT
        found.append(Landing(name, box, out))
    return found


def not_quantized(found: list[Landing]) -> list[Landing]:
    """The same parts of the same weights in bfloat16, without scales."""
    return [
        Landing(one.name, one.box, one.out.to(torch.bfloat16) if one.out.itemsize == 1 else one.out)
        for one in found
        if not one.name.endswith(SCALE_SUFFIX)
    ]


def refusal(refit: Any) -> str:
    with pytest.raises(BridgeError) as raised:
        refit()
    return str(raised.value)


def refused(bridge: AutoBridge, model: Any, release: Tensors, rank: int) -> dict[str, str]:
    """Of each thing that cannot be: what this rank says."""
    name = next(one for one in release if one.endswith(SCALE_SUFFIX)).removesuffix(SCALE_SUFFIX)
    weight, scales = release[name], release[name + SCALE_SUFFIX]
    other = torch.bfloat16 if rank % 2 else torch.float32
    wide = torch.bfloat16 if rank == 1 else torch.float8_e4m3fn
    targets = {
        "no scales": {name: weight},
        "scales of two dtypes": {name: weight, name + SCALE_SUFFIX: scales.to(other)},
        "scales in float16": {name: weight, name + SCALE_SUFFIX: scales.half()},
        "not quantized": {name: weight.to(wide), name + SCALE_SUFFIX: scales},
        "scales of another shape": {name: weight, name + SCALE_SUFFIX: scales.repeat(2, 1)},
    }
    found = {
        case: refusal(lambda own=own: bridge.refit(model, own, fp8=CONFIG))
        for case, own in targets.items()
    }
    own = {name: weight, name + SCALE_SUFFIX: scales}
    return found | {"no config": refusal(lambda: bridge.refit(model, own))}


def run_case(folder: Path, rank: int, name: str) -> dict[str, Any]:
    model_name, _, fields = (FIRST | OTHERS)[name]
    bridge = AutoBridge.from_hf_pretrained(folder / model_name)
    model = built(bridge, MODELS[model_name][2] | fields)
    scale_dtype = torch.bfloat16 if name == "tensor" else torch.float32
    release = quantized(dict(bridge.export_hf_weights(model)), scale_dtype)
    targets = landings(release, rank)
    refit = bridge.refit(model, targets, fp8=CONFIG, window_bytes=WINDOW, delta=True)
    reports, steps = [refit()], [wrong(targets, release)]
    for seed, part in enumerate((0.0, 0.02, 0.4)):
        changed(model, part, seed)
        reports.append(refit())
        release = quantized(dict(bridge.export_hf_weights(model)), scale_dtype)
        steps.append(wrong(targets, release))
    found = {"wrong": steps, "reports": reports, "names": list(release)}
    found["wide bytes"] = bridge.refit(model, not_quantized(targets))().sent_bytes
    if name == "tensor":
        found["refused"] = refused(bridge, model, release, rank)
        found["not finite"] = not_finite(model, refit, targets, release, rank)
    return found


def not_finite(
    model: Any, refit: Refit, targets: list[Landing], release: Tensors, rank: int
) -> tuple[str, bool, list[str]]:
    """What is said of a value that is not finite, on one rank; and that nothing was touched."""
    if rank == 1:
        parameters = dict(model[0].named_parameters())
        name = next(
            one
            for one in parameters
            if one.endswith("mlp.linear_fc2.weight") and "vision" not in one
        )
        parameters[name].data[3, 5] = float("nan")
    return refusal(refit), refit.is_whole, wrong(targets, release)


def of_wide_weights(folder: Path, rank: int) -> dict[str, Any]:
    """A trainer in float32: what is quantized are the values as bfloat16."""
    bridge = AutoBridge.from_hf_pretrained(folder / "hybrid", dtype="float32")
    model = built(bridge, layout(tp=2))
    changed(model, 0.5, 71)
    release = quantized(dict(bridge.export_hf_weights(model, round=True)), torch.float32)
    targets = landings(release, rank)
    exact = bridge.refit(model, targets, fp8=CONFIG)
    found = {"refused": refusal(exact)}
    bridge.refit(model, targets, fp8=CONFIG, round=True)()
    return found | {"wrong": wrong(targets, release)}


def worker(rank: int, folder: str, cases: list[str]) -> None:
    found: dict[str, Any] = {name: run_case(Path(folder), rank, name) for name in cases}
    if "tensor" in cases:
        found["wide"] = of_wide_weights(Path(folder), rank)
    torch.save(found, f"{folder}/found{rank}.pt")
    destroy_process_groups()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("fp8"), FIRST)


@pytest.fixture(scope="module")
def of_others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("fp8_of_others"), OTHERS)


def found_by_ranks(folder: Path, cases: dict[str, Any]) -> list[dict[str, Any]]:
    make_models(folder, {model for model, _, _ in cases.values()})
    run_ranks(worker, str(folder), list(cases), world=WORLD, seconds=900)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(WORLD)]


def check_case(case: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one[case]["wrong"] == [[]] * 4
        assert sum(name.endswith(SCALE_SUFFIX) for name in one[case]["names"]) > 10
        whole, same, few, many = one[case]["reports"]
        assert [report.is_delta for report in (whole, same, few, many)] == [False, *[True] * 3]
        assert same.sent_bytes < few.sent_bytes < many.sent_bytes < 1.2 * whole.sent_bytes
        assert whole.windows > 1
    # Nearly half: of these small models much is not quantized.
    sent = sum(one[case]["reports"][0].sent_bytes for one in found)
    assert 0.4 < sent / sum(one[case]["wide bytes"] for one in found) < 0.75


def test_as_the_whole_weights_are_quantized(found: list[dict[str, Any]]) -> None:
    check_case("tensor", found)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_layouts(case: str, of_others: list[dict[str, Any]]) -> None:
    check_case(case, of_others)


def test_a_trainer_in_float32(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert "do not fit bfloat16 exactly" in one["wide"]["refused"]
        assert one["wide"]["wrong"] == []


def test_what_is_not_finite(found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        message, is_whole, wrong = one["tensor"]["not finite"]
        assert message.startswith("" if rank == 1 else "rank 1 cannot go on: ")
        assert "down_proj.weight: it holds values that are not finite" in message
        assert (is_whole, wrong) == (True, [])


REFUSALS = {
    "no config": "is wanted in FP8, and the model's config has no quantization_config",
    "no scales": "no rank wants its scales; add",
    "scales of two dtypes": "wants these scales in",
    "scales in float16": "its memory is F16; scales are F32 or BF16",
    "not quantized": "its memory is BF16, which does not hold all values of F8_E4M3",
    "scales of another shape": "its shape is",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert REFUSALS[case] in one["tensor"]["refused"][case]
