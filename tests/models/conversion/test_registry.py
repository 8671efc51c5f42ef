"""Rows and registries: look-ups by either name, and declarations that contradict themselves."""

import pytest

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    NormMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.qwen_vl import Qwen3VLBridge

LAYER = "language_model.decoder.layers.11."
HF_LAYER = "model.language_model.layers.11."


@pytest.fixture(scope="module")
def registry() -> MegatronMappingRegistry:
    return Qwen3VLBridge().mapping_registry()


def test_look_up_by_megatron_name(registry: MegatronMappingRegistry) -> None:
    row = registry.megatron_to_hf_lookup(f"{LAYER}self_attention.linear_qkv.weight")
    assert isinstance(row, QKVMapping)
    assert row.hf_param == {
        "q": f"{HF_LAYER}self_attn.q_proj.weight",
        "k": f"{HF_LAYER}self_attn.k_proj.weight",
        "v": f"{HF_LAYER}self_attn.v_proj.weight",
    }
    assert registry.megatron_to_hf_lookup("language_model.no.such.weight") is None
    assert registry.megatron_to_hf_lookup(f"{LAYER}self_attention.linear_qkv.weight.x") is None


def test_look_up_by_hf_name(registry: MegatronMappingRegistry) -> None:
    row = registry.hf_to_megatron_lookup(f"{HF_LAYER}mlp.up_proj.weight")
    assert isinstance(row, GatedMLPMapping)
    assert row.megatron_param == f"{LAYER}mlp.linear_fc1.weight"
    assert registry.hf_to_megatron_lookup("mtp.fc.weight") is None


@pytest.mark.parametrize(
    ("separate", "fused"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_names_of_separate_norms(
    registry: MegatronMappingRegistry, separate: str, fused: str
) -> None:
    rows = [registry.megatron_to_hf_lookup(LAYER + name) for name in (separate, fused)]
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0].hf_param == rows[1].hf_param


def test_every_row_is_found_by_all_its_names(registry: MegatronMappingRegistry) -> None:
    for row in registry.get_all_mappings():
        one = row.resolve(("7",) * row.megatron_param.count("*"))
        found = registry.megatron_to_hf_lookup(one.megatron_param)
        assert found is not None
        assert found.hf_params == one.hf_params
        for name in one.hf_params.values():
            back = registry.hf_to_megatron_lookup(name)
            assert back is not None
            assert back.megatron_param == one.megatron_param
    assert len(registry) == len(registry.get_all_mappings())


def test_two_rows_for_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Megatron parameter mapped by more than one row: \['a'"):
        MegatronMappingRegistry(AutoMapping("a", "x"), AutoMapping("a", "y"))
    with pytest.raises(ValueError, match=r"Hugging Face name mapped by more than one row: \['x'"):
        MegatronMappingRegistry(AutoMapping("a", "x"), AutoMapping("b", "x"))


def test_patterns_must_have_the_same_wildcards() -> None:
    with pytest.raises(ValueError, match="differ in their wildcards"):
        AutoMapping("a.*.weight", "b.weight")
    with pytest.raises(ValueError, match="has 1 wildcards, not 2"):
        AutoMapping("a.*.weight", "b.*.weight").resolve(("1", "2"))


def test_the_numbers_of_a_row_are_those_of_its_kind_of_layer() -> None:
    registry = MegatronMappingRegistry(
        AutoMapping("layers.*.a", "l.*.a", layers="odd"),
        AutoMapping("layers.*.b", "l.*.b", layers="none"),
        AutoMapping("layers.*.c.weight*", "l.*.c.*"),
        AutoMapping("d", "d"),
        AutoMapping("e", "e", only="absent"),
    )
    structure = ModelStructure(
        dims={},
        fields={},
        indices={"layers.": (0, 1, 2, 3), "layers.*.c.weight": (0, 1)},
        stacked=frozenset(),
        features=frozenset(),
        layer_kinds={"odd": (1, 3), "none": ()},
    )
    expanded = {row.megatron_param: ranges for row, ranges in registry.expand(structure)}
    assert expanded == {
        "layers.*.a": ((1, 3),),
        "layers.*.c.weight*": ((0, 1, 2, 3), (0, 1)),
        "d": (),
    }


def test_resolving_leaves_the_declared_row_as_it_was() -> None:
    row = ReplicatedMapping("a.*.weight", "b.*.weight", "H")
    assert row.resolve(("3",)).hf_param == "b.3.weight"
    assert (row.megatron_param, row.hf_param) == ("a.*.weight", "b.*.weight")


def test_extra_states_belong_to_linear_layers_and_norms() -> None:
    assert ColumnParallelMapping("m.fc.weight", "x").extra_state == "m.fc._extra_state"
    assert ColumnParallelMapping("m.*.weight*", "x.*.*").extra_state == "m.*._extra_state*"
    assert ColumnParallelMapping("m.*.weight7", "x.*").extra_state == "m.*._extra_state7"
    assert ColumnParallelMapping("m.*.weights", "x.*").extra_state is None
    assert ColumnParallelMapping("m.fc.bias", "x").extra_state is None
    assert ColumnParallelMapping("m.weight", "x", vocabulary=True).extra_state is None
    assert ReplicatedMapping("m.router.weight", "x").extra_state is None
    assert NormMapping("m.*.norm.weight", "x.*").extra_state == "m.*.norm._extra_state"
    assert NormMapping("m.norm.bias", "x").extra_state is None
    assert NormMapping("m.fc.layer_norm_weight", "x").extra_state is None  # fused: that of fc
