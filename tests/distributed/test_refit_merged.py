"""Refit and export of weights with adapters merged on the way, and of values rounded by name.

The processes are started once and run every case; the tests look at what they found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exchange_layouts import EIGHT_EXPERTS, built, layout
from forked import run_ranks
from megatron.bridge import AutoBridge
from megatron.bridge.errors import BridgeError
from megatron.bridge.exchange.low_rank import LowRank
from megatron.bridge.runtime.parallel import destroy_process_groups
from megatron.bridge.synthetic import make_model
from model_folders import read_tensors

type Tensors = dict[str, torch.Tensor]

RANK, SCALE = 3, 0.75
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 40]}
WINDOW = 100_000
CASES = {"vl_moe": ("qwen3-vl-moe", EIGHT_EXPERTS), "hybrid": ("qwen3.5", {})}
LAYER = "model.language_model.layers.3."


def adapters(model: Any, seed: int) -> list[LowRank]:
    """One for each matrix that is split, with factors that differ as the parts of it do."""
    found = []
    for number, parameter in enumerate(model[0].parameters()):
        is_split = getattr(parameter, "tensor_model_parallel", False)
        is_of_expert = not getattr(parameter, "allreduce", True)
        if parameter.dim() != 2 or not (is_split or is_of_expert):
            continue
        outputs, inputs = parameter.shape
        by_rows = parameter.partition_dim == 0
        rank = torch.distributed.get_rank()
        shared, own = (torch.Generator().manual_seed(97 * number + one) for one in (seed, rank))
        a = torch.randn(RANK, inputs, generator=shared if by_rows else own) / inputs**0.5
        b = torch.randn(outputs, RANK, generator=own if by_rows else shared)
        found.append(LowRank(parameter, a.bfloat16(), b.bfloat16(), SCALE))
    return found


def merged(bridge: AutoBridge, model: Any, merge: list[LowRank]) -> Tensors:
    """What the model is exported as once all adapters are merged into its own memory."""
    before = [one.weight.data for one in merge]
    for one in merge:
        product = one.b.double() @ one.a.double() * one.scale
        one.weight.data = (one.weight.data.double() + product).bfloat16()
    found = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model)}
    for one, data in zip(merge, before, strict=True):
        one.weight.data = data
    return found


def wrong(found: Tensors, expected: Tensors) -> list[str]:
    return [
        name
        for name, tensor in found.items()
        if not torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
    ]


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor.contiguous()) for _ in range(2)]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return parts


def by_the_formula(model: Any, merge: list[LowRank], files: Tensors) -> Iterator[tuple[str, Any]]:
    """(name, what it should be) of tensors that are slices of Megatron's, from the files alone."""
    names = {id(parameter): name for name, parameter in model[0].named_parameters()}
    of_name = {names[id(one.weight)]: one for one in merge}
    layer = "language_model.decoder.layers.3."
    columns = of_name[layer + "self_attention.linear_proj.weight"]
    a = torch.cat(gathered(columns.a), dim=1)
    yield from _merged_of(LAYER + "self_attn.o_proj.weight", files, columns.b, a)
    rows = of_name[layer + "mlp.linear_fc1.weight"]
    half = len(rows.b) // 2
    parts = gathered(rows.b)
    for name, part in (("gate", slice(0, half)), ("up", slice(half, None))):
        b = torch.cat([one[part] for one in parts])
        yield from _merged_of(f"{LAYER}mlp.{name}_proj.weight", files, b, rows.a)


def _merged_of(
    name: str, files: Tensors, b: torch.Tensor, a: torch.Tensor
) -> Iterator[tuple[str, Any]]:
    product = b.double() @ a.double() * SCALE
    yield name, (files[name].double() + product).bfloat16()


def refusal(call: Any) -> str:
    with pytest.raises(BridgeError) as raised:
        call()
    return str(raised.value)


def run_case(folder: Path, case: str) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(folder / case)
    fields = layout(tp=2, ep=2, etp=1) if case == "vl_moe" else layout(tp=2)
    model = built(bridge, fields)
    merge = adapters(model, 5)
    expected = merged(bridge, model, merge)
    plain = read_tensors(folder / case)
    found: dict[str, Any] = {
        "adapters": len(merge),
        "changed": wrong(expected, plain),
        "export": wrong(dict(bridge.export_hf_weights(model, merge=merge, to="all")), expected),
    }
    targets = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    refit = bridge.refit(model, targets, merge=merge, window_bytes=WINDOW, delta=True)
    reports, steps = [refit()], [wrong(targets, expected)]
    for part in (0, 1):  # what training an adapter does: nothing, then a change of some factors
        for one in merge[::2]:
            one.b[1] += part
            one.a[:, 2] -= part
        reports.append(refit())
        steps.append(wrong(targets, merged(bridge, model, merge)))
    found |= {"steps": steps, "reports": reports}
    if case == "hybrid":
        merge = adapters(model, 5)
        found["formula"] = [
            name
            for name, tensor in by_the_formula(model, merge, plain)
            if not torch.equal(tensor, expected[name])
        ]
        found["refused"] = refused(bridge, model, merge)
        found |= beside(bridge, model, merge, expected)
    else:
        found["fp8"] = into_fp8(bridge, model, merge)
    return found


def into_fp8(bridge: AutoBridge, model: Any, merge: list[LowRank]) -> list[str]:
    """Merged and then quantized, against what is quantized of a model that was merged before."""
    expected = merged(bridge, model, merge)
    found: list[Tensors] = [{}, {}]
    for tensors in found:
        for name, tensor in expected.items():
            if "_proj" in name and tensor.dim() > 1:
                rows, columns = -(-tensor.shape[-2] // 24), -(-tensor.shape[-1] // 40)
                tensors[name] = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.zeros(*tensor.shape[:-2], rows, columns)
    bridge.refit(model, found[0], merge=merge, fp8=CONFIG)()
    for one in merge:
        product = one.b.double() @ one.a.double() * one.scale
        one.weight.data = (one.weight.data.double() + product).bfloat16()
    bridge.refit(model, found[1], fp8=CONFIG)()
    return wrong(found[0], found[1])


def refused(bridge: AutoBridge, model: Any, merge: list[LowRank]) -> dict[str, str]:
    first = merge[0]
    other = torch.nn.Parameter(first.weight.detach().clone())
    cases = {
        "another weight": [LowRank(other, first.a, first.b, SCALE)],
        "another shape": [LowRank(first.weight, first.a, first.b[1:], SCALE)],
        "twice": [first, first],
    }
    found = {
        case: refusal(lambda own=own: bridge.refit(model, {}, merge=own))
        for case, own in cases.items()
    }
    patterns = {"no name": "*.nothing", "no names": ["*.norm.*", "lm_heat*"]}
    return found | {
        case: refusal(lambda own=own: bridge.refit(model, {}, round=own))
        for case, own in patterns.items()
    }


def beside(
    bridge: AutoBridge, model: Any, merge: list[LowRank], expected: Tensors
) -> dict[str, Any]:
    """Adapters that are parameters of the model, which no file has a place for."""
    for number, one in enumerate(merge):
        model[0].register_parameter(f"lora_{number}_a", torch.nn.Parameter(one.a))
        model[0].register_parameter(f"lora_{number}_b", torch.nn.Parameter(one.b))
    parameters = dict(model[0].named_parameters())
    own = [
        LowRank(one.weight, parameters[f"lora_{number}_a"], parameters[f"lora_{number}_b"], SCALE)
        for number, one in enumerate(merge)
    ]
    targets = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    without = refusal(lambda: bridge.refit(model, targets))
    bridge.refit(model, targets, merge=own)()
    return {"without": without, "beside": wrong(targets, expected)}


def rounded_by_name(folder: Path) -> dict[str, Any]:
    """A trainer in float32 and targets in bfloat16: only what is named is rounded."""
    bridge = AutoBridge.from_hf_pretrained(folder / "hybrid", dtype="float32")
    model = built(bridge, layout(tp=2))
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            if ".mlp." in name and "norm" not in name:
                parameter *= 1.0 + 2**-12
    expected = dict(bridge.export_hf_weights(model, round=True))
    targets = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    bridge.refit(model, targets, round=["*.mlp.*"])()
    return {
        "wrong": wrong(targets, expected),
        "export": wrong(dict(bridge.export_hf_weights(model, round="*.mlp.*")), expected),
        "too few": refusal(bridge.refit(model, targets, round="*.mlp.up_proj.weight")),
        "narrow": refusal(
            lambda: bridge.refit(model, targets, dtype="float32", round="*.mlp.up_proj.weight")
        ),
    }


def worker(rank: int, folder: str, case: str) -> None:
    found = {case: run_case(Path(folder), case)}
    if case == "hybrid":
        found["rounded"] = rounded_by_name(Path(folder))
    torch.save(found, f"{folder}/found{rank}.pt")
    destroy_process_groups()


def found_by_ranks(folder: Path, case: str) -> list[dict[str, Any]]:
    family, settings = CASES[case]
    make_model(family, folder / case, settings)
    run_ranks(worker, str(folder), case, world=2, seconds=600)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("merged"), "hybrid")


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(tmp_path_factory.mktemp("experts"), "vl_moe")


def check_case(case: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one[case]["adapters"] > 20
        assert len(one[case]["changed"]) > 20
        assert one[case]["export"] == []
        assert one[case]["steps"] == [[]] * 3
        whole, same, changed = one[case]["reports"]
        assert [report.is_delta for report in (whole, same, changed)] == [False, True, True]
        assert same.sent_bytes < changed.sent_bytes < whole.sent_bytes


def test_as_if_merged_before(found: list[dict[str, Any]]) -> None:
    check_case("hybrid", found)


@pytest.mark.slow
def test_experts(with_experts: list[dict[str, Any]]) -> None:
    check_case("vl_moe", with_experts)
    assert [one["vl_moe"]["fp8"] for one in with_experts] == [[], []]


def test_by_the_formula(found: list[dict[str, Any]]) -> None:
    assert [one["hybrid"]["formula"] for one in found] == [[], []]


def test_adapters_that_are_parameters(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert "lora_0_a" in one["hybrid"]["without"]
        assert one["hybrid"]["beside"] == []


REFUSALS = {
    "another weight": "that is no parameter of the model; give the parameters themselves",
    "another shape": "expected a [rank, inputs] and b [outputs, rank]",
    "twice": "has two adapters; merge them before",
    "no name": "round has '*.nothing', and no tensor is of such a name",
    "no names": "round has 'lm_heat*', and no tensor is of such a name",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert REFUSALS[case] in one["hybrid"]["refused"][case]


def test_rounded_by_name(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["rounded"]["wrong"] == one["rounded"]["export"] == []
        assert "round=['*.mlp.up_proj.weight'] has no such name" in one["rounded"]["too few"]
        assert "does not hold all values of F32" in one["rounded"]["narrow"]
