"""Wrong mappings that a round trip cannot see: the comparison with Hugging Face must.

Each case makes one deliberate mistake, in the one place where the correspondence is declared. The
mistake is the same in both directions, so the files come back bit for bit; the logits do not.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.bridge.models.conversion import param_mapping
from megatron.bridge.models.conversion.group_interleave import GroupInterleave, Section
from megatron.bridge.models.conversion.layout import Concatenate, Layout, Same
from megatron.bridge.models.conversion.wrapped_layouts import Transposed
from megatron.bridge.models.qwen_vl import expert_mapping, gated_delta_mapping, qwen_bridge
from megatron.bridge.models.qwen_vl.disk_layout import ExpertLayout
from oracle import tiny

Patch = Callable[[pytest.MonkeyPatch], None]


def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    def layout(self: Any, fields: Any) -> Layout:
        return Concatenate(("up", "gate"))

    patch.setattr(param_mapping.GatedMLPMapping, "layout", layout)


def q_and_k_swapped(patch: pytest.MonkeyPatch) -> None:
    def qkv(heads: int, groups: int, dim: int) -> GroupInterleave:
        assert heads == groups  # otherwise shapes would tell
        return GroupInterleave(groups, tuple(Section(role, dim, dim) for role in "kqv"), "swapped")

    patch.setattr(param_mapping, "qkv", qkv)


def gate_before_q(patch: pytest.MonkeyPatch) -> None:
    def gated_qkv(heads: int, groups: int, dim: int) -> GroupInterleave:
        per_group = heads // groups
        return GroupInterleave(
            groups,
            (
                Section("q", dim, 2 * dim, per_group, base=dim),
                Section("q", dim, 2 * dim, per_group),
                Section("k", dim, dim),
                Section("v", dim, dim),
            ),
            "swapped",
        )

    patch.setattr(param_mapping, "gated_qkv", gated_qkv)


def expert_transposed(patch: pytest.MonkeyPatch) -> None:
    """gate_up, whose matrices are square here; then down's are not, and its shape would tell."""

    def find(*_: Any, **__: Any) -> ExpertLayout:
        return ExpertLayout.FUSED

    def of_one(self: Any) -> Layout:
        return Transposed(Same())

    patch.setattr(qwen_bridge, "find_expert_layout", find)
    patch.setattr(expert_mapping.ExpertMLPGateUpProjMapping, "_of_one", of_one)


def minus_one_dropped(patch: pytest.MonkeyPatch) -> None:
    def layout(self: Any, fields: Any) -> Layout:
        return Same()

    patch.setattr(gated_delta_mapping.ZeroCenteredNormMapping, "layout", layout)


def beta_and_alpha_swapped(patch: pytest.MonkeyPatch) -> None:
    original = gated_delta_mapping.GatedDeltaInProjMapping.layout

    def layout(self: Any, fields: Any) -> Layout:
        return Concatenate(("qkv", "z", "a", "b"), sizes=original(self, fields).sizes)  # type: ignore[attr-defined]

    patch.setattr(gated_delta_mapping.GatedDeltaInProjMapping, "layout", layout)


SQUARE_EXPERTS = {"text_config": {"moe_intermediate_size": 40}}
MANY_KV_HEADS = {"text_config": {"num_key_value_heads": 6}}
MISTAKES: dict[str, tuple[Patch, str, dict[str, Any]]] = {
    "gate and up": (gate_and_up_swapped, "qwen3_vl", {}),
    "q and k": (q_and_k_swapped, "qwen3_vl", MANY_KV_HEADS),
    "q and gate": (gate_before_q, "qwen3_5-3x_value_heads-one_kv_head", {}),
    "expert": (expert_transposed, "qwen3_vl_moe", SQUARE_EXPERTS),
    "minus one": (minus_one_dropped, "qwen3_5-3x_value_heads-one_kv_head", {}),
    "beta and alpha": (beta_and_alpha_swapped, "qwen3_5_moe-2x_value_heads", {}),
}


@pytest.mark.parametrize(("mistake", "case", "config"), MISTAKES.values(), ids=MISTAKES)
def test_the_oracle_sees_what_a_round_trip_does_not(
    mistake: Patch,
    case: str,
    config: dict[str, Any],
    build: Any,
    processor: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    pair = build(config, case=case)
    for name, tensor in pair.bridge.export_hf_weights([pair.ours]):
        assert torch.equal(tensor, pair.bridge.hf_pretrained.tensors.read(name)), name
    inputs = tiny.prompt(processor, ["Only words, but enough of them."])
    with torch.no_grad():
        expected = pair.hf(**inputs).logits
        found = pair.ours(**inputs)[..., : tiny.VOCAB_SIZE]
    assert (found - expected).abs().max() > 100 * 1e-4
