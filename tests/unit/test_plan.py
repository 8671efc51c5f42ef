"""Plans: released models to the byte, and every way in which files can fail to be a model."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

import released_configs as released
from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.plan_builder import build_plan, expected_tensors
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl import Qwen3VLBridge
from megatron.bridge.tensors.boxes import full_box
from megatron.bridge.tensors.spec import TensorSpec

SMALL: dict[str, Any] = copy.deepcopy(released.QWEN3_VL_8B)
SMALL["text_config"] |= {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
    "vocab_size": 300,
    "attention_bias": True,
}
SMALL["vision_config"] |= {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "intermediate_size": 28,
    "out_hidden_size": 40,
    "deepstack_visual_indexes": [1],
}
LAYERS = "language_model.decoder.layers."
EMBEDDING = "language_model.embedding.word_embeddings.weight"


def small_tensors() -> dict[str, TensorSpec]:
    bridge = Qwen3VLBridge()
    structure = bridge.structure(HFConfig.from_dict(SMALL))
    return expected_tensors(bridge.mapping_registry(), structure, lambda name: "BF16")


def small_plan(tensors: dict[str, TensorSpec] | None = None) -> ConversionPlan:
    tensors = small_tensors() if tensors is None else tensors
    return Qwen3VLBridge().plan(HFConfig.from_dict(SMALL), tensors)


def test_the_vocabulary_of_released_models_needs_no_padding() -> None:
    plan = Qwen3VLBridge().plan_from_config(HFConfig.from_dict(released.QWEN3_VL_2B), "BF16")
    assert plan.padding == ()
    assert plan.megatron_bytes == plan.hf_bytes == 4_255_064_064


def test_padding_is_planned() -> None:
    plan = small_plan()
    assert plan.megatron[EMBEDDING].shape == (384, 40)
    assert (EMBEDDING, ((300, 384), (0, 40))) in plan.padding
    assert list(plan.padding_in(EMBEDDING, ((290, 310), (5, 9)))) == [((300, 310), (5, 9))]
    assert plan.megatron_bytes == plan.hf_bytes + 2 * 84 * 40 * 2


def test_layers_that_are_alike_share_a_key() -> None:
    plan = small_plan()
    key = "language_model.decoder.layers.mlp.linear_fc1.weight"
    assert plan.megatron[key].shape == (3, 112, 40)
    copies = [copy for _, copy in plan.copies_to(key, ((2, 3), (50, 60), (0, 40)))]
    assert [copy.hf_name.split(".")[3:] for copy in copies] == [
        ["2", "mlp", "gate_proj", "weight"],
        ["2", "mlp", "up_proj", "weight"],
    ]
    assert f"{key.removesuffix('.weight')}._extra_state/shard_2_3" in plan.extra_states
    assert "vision_model.merger.linear_fc1._extra_state/shard_0_1" in plan.extra_states


def test_rows_count_their_parameters() -> None:
    rows = {row.megatron_param: row for row in small_plan().rows}
    assert rows["language_model.decoder.layers.*.self_attention.linear_qkv.weight"].count == 3
    assert rows["vision_model.decoder.layers.*.self_attention.linear_qkv.bias"].count == 2
    assert rows["vision_model.decoder.deepstack_merger_list.*.linear_fc1.weight"].count == 1
    assert rows[EMBEDDING].layout == "same, 84 rows of padding"


def test_an_absent_bias_and_a_tied_output_have_no_rows() -> None:
    config = copy.deepcopy(SMALL) | {"tie_word_embeddings": True}
    config["text_config"]["attention_bias"] = False
    plan = Qwen3VLBridge().plan_from_config(HFConfig.from_dict(config), "BF16")
    assert "lm_head.weight" not in plan.hf
    assert not any("self_attn" in name and name.endswith("bias") for name in plan.hf)


Q = "model.language_model.layers.1.self_attn.q_proj.weight"
K = "model.language_model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("name", sorted(small_tensors()))
def test_every_key_is_missed(name: str) -> None:
    tensors = small_tensors()
    del tensors[name]
    with pytest.raises(PlanError) as error:
        small_plan(tensors)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"{name}: missing, needed for ")


@pytest.mark.parametrize("name", sorted(small_tensors()))
def test_every_reshape_is_refused(name: str) -> None:
    tensors = small_tensors()
    spec = tensors[name]
    shape = (*spec.shape[:-1], spec.shape[-1] + 1)
    tensors[name] = replace(spec, shape=shape)
    with pytest.raises(PlanError) as error:
        small_plan(tensors)
    assert any(p.startswith(f"{name}: the config asks for shape") for p in error.value.problems)
    assert str(shape) in str(error.value)


def test_a_renamed_key_is_recognized() -> None:
    tensors = small_tensors()
    renamed = Q.replace("q_proj", "query_proj")
    tensors[renamed] = replace(tensors.pop(Q), name=renamed)
    with pytest.raises(PlanError) as error:
        small_plan(tensors)
    assert f"{Q}: missing" in error.value.problems[0]
    assert f"was it renamed to {renamed}?" in error.value.problems[0]
    assert error.value.problems[1].startswith(f"{renamed}: no row maps it")


@pytest.mark.parametrize("layers", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_one_wrong_number_is_a_short_message(layers: int) -> None:
    """Not a line for each of thousands of layers."""
    config = copy.deepcopy(SMALL)
    config["text_config"]["num_hidden_layers"] = layers
    with pytest.raises(PlanError) as error:
        Qwen3VLBridge().plan(HFConfig.from_dict(config), small_tensors())
    heading, cause = str(error.value).splitlines()
    assert heading == f"the conversion is not proven: {len(error.value.problems)} problems"
    assert len(error.value.problems) > 10 * layers
    assert cause.startswith(
        f"  - text_config.num_hidden_layers is {layers}, the files hold 3 layers (0...2): "
        "set it to 3"
    )


def test_problems_of_all_layers_are_folded_and_name_each() -> None:
    tensors = small_tensors()
    for name, spec in tensors.items():
        if name.endswith("gate_proj.weight"):
            tensors[name] = replace(spec, shape=(57, 40))
    with pytest.raises(PlanError) as error:
        small_plan(tensors)
    heading, problem, _ = str(error.value).splitlines()
    assert heading == "the conversion is not proven: 3 problems"
    assert problem == (
        "  - model.language_model.layers.{0...2}.mlp.gate_proj.weight: the config asks for shape "
        "(56, 40) [I H], found (57, 40)"
    )


def test_many_renamed_keys_are_recognized_at_once() -> None:
    tensors = small_tensors()
    names = [name for name in tensors if ".layers." in name and "_proj." in name]
    renamed = {name: name.replace("_proj.", "_projection.") for name in names}
    for old, new in renamed.items():
        tensors[new] = replace(tensors.pop(old), name=new)
    with pytest.raises(PlanError) as error:
        small_plan(tensors)
    for old, new in renamed.items():
        assert any(
            problem.startswith(f"{old}: missing") and f"renamed to {new}?" in problem
            for problem in error.value.problems
        )


def test_a_transposed_tensor_is_refused() -> None:
    tensors = small_tensors()
    tensors[Q] = replace(tensors[Q], shape=tensors[Q].shape[::-1])
    with pytest.raises(PlanError, match=r"q_proj.weight: the config asks for shape \(72, 40\)"):
        small_plan(tensors)


def test_a_head_that_the_config_ties_has_to_be_the_embedding() -> None:
    config = HFConfig.from_dict(SMALL | {"tie_word_embeddings": True})
    plan = Qwen3VLBridge().plan(config, small_tensors())
    assert plan.equal["lm_head.weight"].name == "model.language_model.embed_tokens.weight"
    assert set(plan.carried) == {"lm_head.weight"}


def test_a_parameter_holds_the_dtypes_of_all_its_tensors() -> None:
    tensors = small_tensors()
    tensors[K] = replace(tensors[K], dtype="F16")
    plan = small_plan(tensors)
    assert plan.megatron[f"{LAYERS}self_attention.linear_qkv.weight"].dtype == "F32"
    assert (plan.hf[K].dtype, plan.hf[Q].dtype) == ("F16", "BF16")
    tensors[K] = replace(tensors[K], dtype="F8_E4M3")
    with pytest.raises(PlanError, match=rf"{K}: F8_E4M3, but its scale {K}_scale_inv is missing"):
        small_plan(tensors)
    tensors[K] = replace(tensors[K], dtype="I8")
    with pytest.raises(PlanError, match=rf"1 of \d+ tensors are I8, such as {K}") as error:
        small_plan(tensors)
    assert "found ['BF16', 'I8']; convert the files to one" in error.value.problems[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_a_key_of_several_layers_holds_the_dtypes_of_all(layer: int) -> None:
    tensors = small_tensors()
    name = f"model.language_model.layers.{layer}.self_attn.o_proj.weight"
    tensors[name] = replace(tensors[name], dtype="F32")
    plan = small_plan(tensors)
    assert plan.megatron[f"{LAYERS}self_attention.linear_proj.weight"].dtype == "F32"
    assert {plan.hf[n].dtype for n in tensors if n != name} == {"BF16"}
    tensors[name] = replace(tensors[name], dtype="I16")
    with pytest.raises(PlanError, match=rf"1 of \d+ tensors are I16, such as {name}") as error:
        small_plan(tensors)
    assert "o_proj.weight: layers share the checkpoint tensor" in error.value.problems[0]


def test_each_tensor_keeps_its_dtype() -> None:
    tensors = small_tensors()
    name = "model.language_model.norm.weight"
    tensors[name] = replace(tensors[name], dtype="F32")
    plan = small_plan(tensors)
    assert plan.megatron["language_model.decoder.final_layernorm.weight"].dtype == "F32"
    assert plan.megatron[EMBEDDING].dtype == "BF16"


def test_all_problems_are_gathered() -> None:
    tensors = small_tensors()
    del tensors[Q]
    tensors[K] = replace(tensors[K], shape=(7, 7))
    tensors["model.extra"] = TensorSpec("model.extra", (3,), "BF16")
    with pytest.raises(PlanError) as error:
        small_plan(tensors)
    assert [problem.split(":")[0] for problem in error.value.problems] == [K, Q, "model.extra"]
    assert "3 problems" in str(error.value)


def test_the_proof_sees_a_copy_too_few_and_one_too_many() -> None:
    plan = small_plan()
    assert list(plan.faults()) == []
    fewer = replace(plan, copies=plan.copies[:-1])
    lost = plan.copies[-1]
    assert any(lost.hf_name in fault and "not filled" in fault for fault in fewer.faults())
    assert any(lost.megatron_key in fault and "not filled" in fault for fault in fewer.faults())
    more = replace(plan, copies=(*plan.copies, lost))
    assert any(lost.hf_name in fault and "filled 2 times" in fault for fault in more.faults())


def test_the_proof_sees_boxes_of_different_shape() -> None:
    plan = small_plan()
    first = plan.copies[0]
    turned = first._replace(hf_box=(first.hf_box[1], first.hf_box[0]))
    faults = list(replace(plan, copies=(turned, *plan.copies[1:])).faults())
    assert any("differ in shape" in fault for fault in faults)


def test_rows_without_shapes_need_files() -> None:
    structure = Qwen3VLBridge().structure(HFConfig.from_dict(SMALL))
    registry = MegatronMappingRegistry(AutoMapping("language_model.a.weight", "a.weight"))
    with pytest.raises(PlanError, match=r"declares no shape for a\.weight"):
        expected_tensors(registry, structure, lambda name: "BF16")
    plan = build_plan(registry, structure, {"a.weight": TensorSpec("a.weight", (2, 3), "F32")})
    assert plan.copies[0].megatron_box == full_box((2, 3))


def test_layers_may_differ_in_shape_where_they_have_keys_of_their_own() -> None:
    structure = Qwen3VLBridge().structure(HFConfig.from_dict(SMALL))
    structure = replace(structure, stacked=frozenset())
    name = f"{LAYERS}*.a.weight"
    registry = MegatronMappingRegistry(AutoMapping(name, "l.*.a"))
    shapes = [(5, 3), (7, 2), (3, 5)]
    tensors = {f"l.{n}.a": TensorSpec(f"l.{n}.a", shape, "BF16") for n, shape in enumerate(shapes)}
    plan = build_plan(registry, structure, tensors)
    assert [spec.shape for spec in plan.megatron.values()] == shapes
    assert [copy.megatron_box for copy in plan.copies] == [full_box(shape) for shape in shapes]
    assert [(row.numbers, row.count) for row in plan.rows] == [(((0, 1, 2),), 3)]


@pytest.mark.parametrize(
    "name", [f"{LAYERS}2.mlp.linear_fc2.weight", "mtp.layer.mlp.experts.linear_fc2.weight2"]
)
def test_a_row_for_one_of_many_that_share_a_key_is_refused(name: str) -> None:
    structure = Qwen3VLBridge().structure(HFConfig.from_dict(SMALL))
    with pytest.raises(ValueError, match=f"{name}: layers and experts share a key"):
        structure.place(name, (3, 5))


def test_planning_needs_neither_torch_nor_megatron_core() -> None:
    code = (
        "import json, sys; from megatron.bridge.models.qwen_vl import Qwen3VLBridge; "
        "from megatron.bridge.models.hf_pretrained.config import HFConfig; "
        "config = HFConfig.from_dict(json.loads(sys.argv[1])); "
        "Qwen3VLBridge().plan_from_config(config, 'BF16'); "
        "print([m for m in ('torch', 'megatron.core', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, json.dumps(SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
