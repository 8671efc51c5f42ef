"""transformers loads what we export: every family, disk layout and precision, and no key is left.

Two layouts that can be written are not in its conversion tables: Qwen3-VL-MoE with an expert for
each tensor, and Qwen3.5-MoE transposed. Of the MTP layer it ignores the tensors by design.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.operations.verification.bitwise import verify
from megatron.bridge.synthetic import make_model
from torch_dist_folders import write_torch_dist
from vision_families import FAMILIES

MOE = [family for family in FAMILIES if family.endswith("-moe")]
READABLE = {
    "qwen3-vl-moe": ("fused", "fused-transposed"),
    "qwen3.5-moe": ("fused", "per-expert"),
}
LAYOUTS = ("fused", "fused-transposed", "per-expert")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers makes of a folder, whose keys it must use up."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


class Converted:
    """A model, the checkpoint made of it, and what transformers reads of the model."""

    def __init__(self, folder: Path, family: str, **settings: Any) -> None:
        self.hf = PreTrainedVLM.from_pretrained(make_model(family, folder / "hf", settings))
        self.checkpoint = folder / "megatron"
        import_checkpoint(self.hf, self.checkpoint)

    def export(self, target: Path, **options: Any) -> Path:
        export_checkpoint(self.checkpoint, target, self.hf, **options)
        return target


@pytest.fixture(scope="module", params=MOE)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """As released; its `family` is that of the parameter."""
    model = Converted(tmp_path_factory.mktemp("moe"), request.param, num_shards=2)
    model.family = request.param  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize(
    ("family", "tied"), [(family, number % 2 == 1) for number, family in enumerate(FAMILIES)]
)
def test_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    model = Converted(tmp_path, family, tie_word_embeddings=tied, num_shards=2)
    assert_equal(load(model.export(tmp_path / "out")), load(tmp_path / "hf"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_experts(moe: Any, layout: str, tmp_path: Path) -> None:
    out = moe.export(tmp_path / "out", experts=layout)
    assert verify(moe.checkpoint, out).identical
    lying = {name for name in PreTrainedVLM.from_pretrained(out).tensors if ".experts." in name}
    assert any(name.endswith(".experts.0.up_proj.weight") for name in lying) == (
        layout == "per-expert"
    )
    assert {name for name in moe.hf.tensors if ".experts." not in name} == {
        name for name in PreTrainedVLM.from_pretrained(out).tensors if name not in lying
    }
    if layout in READABLE[moe.family]:
        assert_equal(load(out), load(moe.hf.folder))


@pytest.mark.parametrize(
    ("family", "source"), [(family, source) for family in MOE for source in READABLE[family]]
)
def test_from_every_layout_of_experts(family: str, source: str, tmp_path: Path) -> None:
    """To the other one that transformers reads; the MTP experts lie in a third way."""
    model = Converted(tmp_path, family, experts=source)
    (target,) = set(READABLE[family]) - {source}
    assert_equal(load(model.export(tmp_path / "out", experts=target)), load(tmp_path / "hf"))


@pytest.mark.parametrize("family", ["qwen3-vl-moe", "qwen3.5-moe"])  # every kind of layer
def test_fp8_without_fp8(family: str, tmp_path: Path) -> None:
    """A BF16 export of an FP8 release is an ordinary model."""
    model = Converted(tmp_path, family, fp8=True)
    out = model.export(tmp_path / "out")
    expected = model.hf.load_model(dtype=torch.float32).state_dict()
    assert_equal(load(out), expected)
    for name, tensor in PreTrainedVLM.from_pretrained(out).weights.items():
        assert tensor.dtype != "F8_E4M3", name


def without_mtp(model: Converted, folder: Path) -> Path:
    """The checkpoint that a model trained without its MTP layer leaves."""
    from megatron.bridge.models.catalog import bridge_for
    from megatron.bridge.models.conversion.model_bridge import PlanOptions
    from megatron.bridge.models.conversion.transfer import fill_megatron

    hf = model.hf
    bridge = bridge_for(hf.hf_config.architecture)
    plan = bridge.plan(hf.hf_config, hf.weights, PlanOptions(without=frozenset({"mtp"})))
    write_torch_dist(
        folder / "iter_0000003",
        plan.megatron,
        lambda key, box, out: fill_megatron(plan, key, box, out, hf.weights),
        ((parameter.key, parameter.box) for parameter in plan.parameters),
        plan.extra_states,
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"experts": "per-expert"}, {"fp8": True}], ids=["as it is", "per expert", "fp8"]
)
def test_what_the_checkpoint_has_no_place_for_is_carried_over(
    options: dict[str, Any], tmp_path: Path
) -> None:
    fp8 = "fp8" in options
    model = Converted(tmp_path, "qwen3.5-moe", fp8=fp8, mtp_experts="fused")
    model.checkpoint = without_mtp(model, tmp_path / "no-mtp")
    done = export_checkpoint(model.checkpoint, tmp_path / "out", model.hf, **options)
    mtp = {name for name in model.hf.tensors if name.startswith("mtp.")}
    assert set(done.plan.carried) == {name for name in model.hf.weights if name in mtp}
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in done.plan.carried
    out = PreTrainedVLM.from_pretrained(tmp_path / "out")
    assert {name for name in out.tensors if name.startswith("mtp.")} == mtp
    for name in mtp:
        assert torch.equal(
            out.tensors.read(name).view(torch.uint8), model.hf.tensors.read(name).view(torch.uint8)
        ), name
    if not fp8:
        assert_equal(load(tmp_path / "out"), load(tmp_path / "hf"))
